//! Requests and responses over one or many connections that take turns: one is on its way at a time,
//! so the time of each is the path's latency, and with many flows what finding each costs.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

use super::{CONNECT_TIME_MAX, Meter, Server, TICK, Task, close, is_tick, listen, say};
use crate::cli::bench::case::Measured;
use crate::cli::bench::statistics::{PERCENTILES, percentile};

/// A request, and a response.
const MESSAGE_BYTES: usize = 64;
/// Threads that open connections: slow paths take turns in the handshakes.
const OPENERS: usize = 8;
/// How long all connections together may take to open.
const OPEN_TIME_MAX: Duration = Duration::from_secs(10);
/// Round trips before the first that counts, for one flow: caches and ARP.
const WARM_UP: usize = 20;
/// How long one round trip may take.
const ROUND_TRIP_TIME_MAX: Duration = Duration::from_secs(2);
/// Events of one look at the server's connections.
const EVENTS: usize = 256;
/// Ticks per second in /proc/stat: USER_HZ, the same on every Linux port but Alpha and IA-64.
const USER_HZ: f64 = 100.0;

pub(super) fn serve(at: SocketAddr) -> std::io::Result<Server> {
    let listener = listen(at)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let stop = Arc::new(AtomicBool::new(false));
    let echo = {
        let stop = Arc::clone(&stop);
        move || {
            let _ = echo(&listener, &stop);
        }
    };
    Ok(Server {
        at: address,
        stop,
        meter: Arc::new(Meter::new(TICK)),
        threads: vec![thread::spawn(echo)],
    })
}

/// Sends back what comes, on every connection.
fn echo(listener: &TcpListener, stop: &AtomicBool) -> rustix::io::Result<()> {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let watch = |fd: BorrowedFd<'_>, index: usize| {
        epoll::add(
            &poll,
            fd,
            epoll::EventData::new_u64(index as u64),
            epoll::EventFlags::IN,
        )
    };
    watch(listener.as_fd(), usize::MAX)?;
    let mut streams: Vec<Option<TcpStream>> = Vec::new();
    let mut events = Vec::with_capacity(EVENTS);
    let tick = Timespec {
        tv_sec: 0,
        tv_nsec: TICK.as_nanos() as _,
    };
    while !stop.load(Ordering::Relaxed) {
        events.clear();
        match epoll::wait(
            &poll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&tick),
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        for event in &events {
            let index = event.data.u64() as usize;
            let Some(slot) = streams.get_mut(index) else {
                while let Ok((stream, _)) = listener.accept() {
                    let _ = stream.set_nodelay(true);
                    watch(stream.as_fd(), streams.len())?;
                    streams.push(Some(stream));
                }
                continue;
            };
            let mut buffer = [0; MESSAGE_BYTES];
            let echoed = slot.as_mut().is_some_and(|stream| {
                let read = stream.read(&mut buffer);
                read.is_ok_and(|count| count > 0 && stream.write_all(&buffer[..count]).is_ok())
            });
            if !echoed {
                *slot = None;
            }
        }
    }
    streams.iter().flatten().for_each(close);
    Ok(())
}

pub(super) fn run(task: Task, flows: usize, to: SocketAddr) -> Result<Measured, String> {
    let mut streams = open(flows, to)?;
    let measured = take_turns(&mut streams, task.time);
    streams.iter().for_each(close);
    measured
}

/// Opens connections and uses each once.
pub(super) fn hold(flows: usize, to: SocketAddr) -> Result<Vec<TcpStream>, String> {
    let mut streams = open(flows, to)?;
    streams.iter_mut().try_for_each(round_trip)?;
    Ok(streams)
}

fn open(flows: usize, to: SocketAddr) -> Result<Vec<TcpStream>, String> {
    let begun = Instant::now();
    let next = Arc::new(AtomicUsize::new(0));
    let opener = |_| {
        let next = Arc::clone(&next);
        thread::spawn(move || {
            let mut streams = Vec::new();
            while next.fetch_add(1, Ordering::Relaxed) < flows && begun.elapsed() < OPEN_TIME_MAX {
                let stream = TcpStream::connect_timeout(&to, CONNECT_TIME_MAX)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(ROUND_TRIP_TIME_MAX))?;
                streams.push(stream);
            }
            Ok::<_, std::io::Error>(streams)
        })
    };
    let openers: Vec<_> = (0..OPENERS.min(flows)).map(opener).collect();
    let mut streams = Vec::with_capacity(flows);
    let mut failure = None;
    for opener in openers {
        match opener.join().map_err(|_| say("a thread failed"))? {
            Ok(opened) => streams.extend(opened),
            Err(error) => failure = Some(error),
        }
    }
    if streams.len() == flows {
        return Ok(streams);
    }
    streams.iter().for_each(close);
    let opened = format!("only {} of {flows} connections opened", streams.len());
    Err(match failure {
        Some(error) => format!("{opened}: {error}"),
        None => format!("{opened} in {} s", OPEN_TIME_MAX.as_secs()),
    })
}

fn take_turns(streams: &mut [TcpStream], time: Duration) -> Result<Measured, String> {
    for _ in 0..WARM_UP {
        round_trip(&mut streams[0])?;
    }
    let mut nanos = Vec::new();
    let busy = busy_secs();
    let begun = Instant::now();
    let mut index = 0;
    while begun.elapsed() < time {
        let started = Instant::now();
        round_trip(&mut streams[index])?;
        let taken = started.elapsed().as_nanos();
        nanos.push(u32::try_from(taken).unwrap_or(u32::MAX));
        index = (index + 1) % streams.len();
    }
    let secs = begun.elapsed().as_secs_f64();
    let busy_secs = busy.zip(busy_secs()).map_or(0.0, |(from, to)| to - from);
    nanos.sort_unstable();
    let micros = |hundredths| percentile(&nanos, hundredths).map_or(0.0, |ns| f64::from(ns) / 1e3);
    Ok(Measured {
        secs,
        units: nanos.len() as u64,
        bytes: (nanos.len() * MESSAGE_BYTES) as u64,
        round_trip_us: PERCENTILES.map(micros),
        busy_secs,
    })
}

fn round_trip(stream: &mut TcpStream) -> Result<(), String> {
    let mut buffer = [0x5a; MESSAGE_BYTES];
    let done = stream
        .write_all(&buffer)
        .and_then(|()| stream.read_exact(&mut buffer));
    done.map_err(|error| match is_tick(&error) {
        true => format!("no response within {} s", ROUND_TRIP_TIME_MAX.as_secs()),
        false => format!("a connection broke: {error}"),
    })
}

/// Seconds that the machine's processors have worked: user, nice, system, irq and softirq of the first
/// line of /proc/stat (proc(5)).
fn busy_secs() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    let numbers: Vec<f64> = text
        .lines()
        .next()?
        .split_whitespace()
        .skip(1)
        .map_while(|word| word.parse().ok())
        .collect();
    let busy = [0, 1, 2, 5, 6].map(|index| numbers.get(index).copied().unwrap_or(0.0));
    Some(busy.iter().sum::<f64>() / USER_HZ)
}
