//! TCP streams that send as fast as they can.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{CONNECT_TIME_MAX, MARGIN, Meter, Server, Task, close, is_tick, listen, say, tick};
use crate::cli::bench::case::Measured;

/// Bytes of one read or write: what iperf3 uses, and above the largest super-frame.
const BUFFER_BYTES: usize = 128 * 1024;
/// How long the first byte may take: a peer that stalls goes on within a few retransmissions.
const FIRST_BYTE_TIME_MAX: Duration = Duration::from_secs(2);

pub(super) fn serve(task: Task, at: SocketAddr) -> std::io::Result<Server> {
    let listener = listen(at)?;
    tick(&listener)?;
    let address = listener.local_addr()?;
    let stop = Arc::new(AtomicBool::new(false));
    let meter = Arc::new(Meter::new(task.time));
    let acceptor = {
        let (stop, meter) = (Arc::clone(&stop), Arc::clone(&meter));
        move || accept(&listener, task, &stop, &meter)
    };
    Ok(Server {
        at: address,
        stop,
        meter,
        threads: vec![thread::spawn(acceptor)],
    })
}

fn accept(listener: &TcpListener, task: Task, stop: &Arc<AtomicBool>, meter: &Arc<Meter>) {
    let mut threads = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        let (stop, meter) = (Arc::clone(stop), Arc::clone(meter));
        threads.push(thread::spawn(move || match task.reverse {
            true => send(stream, task.time),
            false => receive(stream, &meter, || stop.load(Ordering::Relaxed)),
        }));
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// Sends for the time and a margin.
fn send(mut stream: TcpStream, time: Duration) {
    let bytes = vec![0x5a; BUFFER_BYTES];
    let end = Instant::now() + time + MARGIN;
    let _ = tick(&stream);
    while Instant::now() < end {
        match stream.write(&bytes) {
            Ok(_) => {}
            Err(error) if is_tick(&error) => {}
            Err(_) => break,
        }
    }
    close(&stream);
}

/// Counts until the stream ends or `is_enough`.
fn receive(mut stream: TcpStream, meter: &Meter, is_enough: impl Fn() -> bool) {
    let mut buffer = vec![0; BUFFER_BYTES];
    let _ = tick(&stream);
    while !is_enough() {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => drop(meter.add(count, 1)),
            Err(error) if is_tick(&error) => {}
            Err(_) => break,
        }
    }
    close(&stream);
}

pub(super) fn run(task: Task, streams: usize, to: SocketAddr) -> Result<Measured, String> {
    let connect = |_| {
        TcpStream::connect_timeout(&to, CONNECT_TIME_MAX).map_err(|error| match error.kind() {
            ErrorKind::TimedOut => "a connection did not open in time".to_owned(),
            _ => format!("cannot connect: {error}"),
        })
    };
    let streams: Vec<_> = (0..streams).map(connect).collect::<Result<_, _>>()?;
    let meter = Arc::new(Meter::new(task.time));
    let begun = Instant::now();
    let threads = streams.into_iter().map(|stream| {
        let meter = Arc::clone(&meter);
        thread::spawn(move || match task.reverse {
            false => send(stream, task.time),
            true => receive(stream, &meter, || {
                let waits = meter.is_empty() && begun.elapsed() > FIRST_BYTE_TIME_MAX;
                meter.is_over() || waits
            }),
        })
    });
    for thread in threads.collect::<Vec<_>>() {
        thread.join().map_err(|_| say("a stream's thread failed"))?;
    }
    Ok(meter.measured())
}
