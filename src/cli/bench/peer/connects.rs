//! Connections that are opened and closed, as many as can be.
//!
//! The server closes first. So the client, and a NAT on its way, keep no connection in TIME_WAIT and
//! don't run out of ports.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::{CONNECT_TIME_MAX, Meter, Server, TICK, Task, listen, say, tick};
use crate::cli::bench::case::Measured;

/// Connections at a time: enough that the path is busy while one waits for its handshake.
const PARALLEL: usize = 4;
/// How long the server's end of a connection may take to arrive.
const END_TIME_MAX: Duration = Duration::from_secs(1);

pub(super) fn serve(at: SocketAddr) -> std::io::Result<Server> {
    let listener = listen(at)?;
    tick(&listener)?;
    let address = listener.local_addr()?;
    let stop = Arc::new(AtomicBool::new(false));
    let acceptor = {
        let stop = Arc::clone(&stop);
        move || {
            while !stop.load(Ordering::Relaxed) {
                drop(listener.accept());
            }
        }
    };
    Ok(Server {
        at: address,
        stop,
        meter: Arc::new(Meter::new(TICK)),
        threads: vec![thread::spawn(acceptor)],
    })
}

pub(super) fn run(task: Task, to: SocketAddr) -> Result<Measured, String> {
    let meter = Arc::new(Meter::new(task.time));
    let threads = (0..PARALLEL).map(|_| {
        let meter = Arc::clone(&meter);
        thread::spawn(move || open_and_close(to, &meter))
    });
    let mut failure = None;
    for thread in threads.collect::<Vec<_>>() {
        let ended = thread.join().map_err(|_| say("a thread failed"))?;
        failure = failure.or(ended.err());
    }
    match failure {
        Some(error) if meter.is_empty() => Err(format!("cannot connect: {error}")),
        // Some that failed show as a lower rate: each has cost its time limit.
        _ => Ok(meter.measured()),
    }
}

fn open_and_close(to: SocketAddr, meter: &Meter) -> std::io::Result<()> {
    while !meter.is_over() {
        let mut stream = TcpStream::connect_timeout(&to, CONNECT_TIME_MAX)?;
        stream.set_read_timeout(Some(END_TIME_MAX))?;
        if stream.read(&mut [0; 1])? == 0 {
            meter.add(0, 1);
        }
    }
    Ok(())
}
