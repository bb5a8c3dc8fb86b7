//! The load generators: a process at each end of what is measured, which does what it is asked on
//! standard input and answers on standard output, one line of JSON each.
//!
//! One end serves ([`Request::Serve`], until [`Request::Finish`]), the other runs ([`Request::Run`]).
//! Whoever receives counts, from the first byte for as long as the run's time, so a sender that stalls
//! shows in the figure. Every wait in here has an end; the controller has a limit above all of them.
//! When standard input ends, so does the process.

mod connects;
mod meter;
mod round_trips;
mod tcp;
mod udp;

use std::io::{BufRead, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use self::meter::Meter;
use super::super::{Failure, print};
use super::case::{Load, Measured};

/// How long a blocked call goes without a look at the clock.
const TICK: Duration = Duration::from_millis(50);
/// A sender goes on for this much longer than the receiver counts, which begins a little later.
const MARGIN: Duration = Duration::from_millis(100);
/// How long a connection may take to open. A SYN that is dropped is sent again after 1 s.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
/// Connections that may wait to be accepted: net.core.somaxconn's default, where std has 128. Eight
/// openers outrun a server that shares a processor with them, and a SYN too many costs a second.
const BACKLOG: i32 = 4096;
/// Said of a case that is looked up.
const NO_LOAD: &str = "this case has no load";
/// Descriptors beside those of the flows.
const FDS_SPARE: u64 = 64;

/// What the controller asks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// The address by which `to` is reached: an error where there is none yet.
    Source { to: IpAddr },
    /// Serve at this address; port 0: at any.
    Serve {
        load: Load,
        reverse: bool,
        at: SocketAddr,
        secs: f64,
    },
    /// Run against a server; `reverse`: the server sends.
    Run {
        load: Load,
        reverse: bool,
        to: SocketAddr,
        secs: f64,
    },
    /// End serving.
    Finish,
    /// Open so many connections (or sockets) more to a server of this load, use each once, and keep
    /// them until the process ends.
    Hold {
        load: Load,
        to: SocketAddr,
        count: usize,
    },
}

/// What it hears.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// Said by a VM's script, before the load generators start.
    Ready,
    Source(IpAddr),
    Serving(SocketAddr),
    Measured(Measured),
    Held,
    Failed(String),
}

/// A server at work.
struct Server {
    at: SocketAddr,
    stop: Arc<AtomicBool>,
    meter: Arc<Meter>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    fn finish(self) -> Measured {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            let _ = thread.join();
        }
        self.meter.measured()
    }
}

/// What is kept open.
#[derive(Default)]
struct Held {
    streams: Vec<TcpStream>,
    datagrams: Vec<UdpSocket>,
}

/// What a load has to know.
#[derive(Clone, Copy)]
struct Task {
    load: Load,
    reverse: bool,
    time: Duration,
}

pub(super) fn run() -> Result<ExitCode, Failure> {
    raise_open_files();
    let (mut server, mut held) = (None, Held::default());
    for line in std::io::stdin().lock().lines() {
        let request = serde_json::from_str(&line?).map_err(std::io::Error::from)?;
        let reply = answer(request, &mut server, &mut held).unwrap_or_else(Reply::Failed);
        let mut text = serde_json::to_string(&reply).map_err(std::io::Error::from)?;
        text.push('\n');
        print(&text)?;
        std::io::stdout().flush()?;
    }
    // Threads may still wait in calls of theirs.
    std::process::exit(0)
}

fn answer(request: Request, server: &mut Option<Server>, held: &mut Held) -> Result<Reply, String> {
    match request {
        Request::Source { to } => source(to).map(Reply::Source).map_err(say),
        Request::Serve {
            load,
            reverse,
            at,
            secs,
        } => {
            let task = task(load, reverse, secs)?;
            let new = serve(task, at)?;
            let at = new.at;
            if let Some(old) = server.replace(new) {
                old.finish();
            }
            Ok(Reply::Serving(at))
        }
        Request::Run {
            load,
            reverse,
            to,
            secs,
        } => {
            let task = task(load, reverse, secs)?;
            match load {
                Load::Tcp { streams } => tcp::run(task, streams, to),
                Load::Udp { .. } => udp::run(task, to),
                Load::RoundTrips { flows } => round_trips::run(task, flows, to),
                Load::Connects => connects::run(task, to),
                Load::Pairs | Load::Cost(_) => return Err(NO_LOAD.to_owned()),
            }
            .map(Reply::Measured)
        }
        Request::Finish => match server.take() {
            Some(server) => Ok(Reply::Measured(server.finish())),
            None => Err("nothing was served".to_owned()),
        },
        Request::Hold { load, to, count } => {
            match load {
                Load::Udp { .. } => held.datagrams.extend(udp::hold(count, to).map_err(say)?),
                _ => held.streams.extend(round_trips::hold(count, to)?),
            }
            Ok(Reply::Held)
        }
    }
}

fn task(load: Load, reverse: bool, secs: f64) -> Result<Task, String> {
    let time = Duration::try_from_secs_f64(secs).map_err(say)?;
    if let Load::RoundTrips { flows } = load {
        let wanted = flows as u64 + FDS_SPARE;
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        if limit < wanted {
            return Err(format!(
                "{flows} connections need {wanted} open files, and the hard limit is {limit}"
            ));
        }
    }
    Ok(Task {
        load,
        reverse,
        time,
    })
}

fn serve(task: Task, at: SocketAddr) -> Result<Server, String> {
    match task.load {
        Load::Pairs | Load::Cost(_) => return Err(NO_LOAD.to_owned()),
        Load::Tcp { .. } => tcp::serve(task, at),
        Load::Udp { .. } => udp::serve(task, at),
        Load::RoundTrips { .. } => round_trips::serve(at),
        Load::Connects => connects::serve(at),
    }
    .map_err(say)
}

/// The address that a socket of this machine would have towards `to`. Nothing is sent.
fn source(to: IpAddr) -> std::io::Result<IpAddr> {
    let any: IpAddr = match to {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((to, 9))?;
    Ok(socket.local_addr()?.ip())
}

/// As far as it goes; what is missing is said when somebody needs it.
fn raise_open_files() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    );
}

/// A listener that takes connections by the thousand.
fn listen(at: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(at)?;
    // A second listen changes the backlog alone.
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// Has every blocking call on a socket return after a [`TICK`].
fn tick(socket: impl AsFd) -> std::io::Result<()> {
    set_socket_timeout(&socket, Timeout::Recv, Some(TICK))?;
    set_socket_timeout(&socket, Timeout::Send, Some(TICK))?;
    Ok(())
}

/// Closes by reset: a connection that is over leaves no TIME_WAIT, and no data on its way.
fn close(socket: impl AsFd) {
    let _ = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

/// Whether a call ended because of [`tick`].
fn is_tick(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::WouldBlock
            | std::io::ErrorKind::TimedOut
            | std::io::ErrorKind::Interrupted
    )
}

fn say(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::case::{CASES, Case};

    /// Every load over the loopback, both ways where there are two.
    #[test]
    fn every_load_measures_something() {
        let loopback: IpAddr = [127, 0, 0, 1].into();
        let is_run = |case: &&Case| {
            case.name != "flows-10k" && !matches!(case.load, Load::Pairs | Load::Cost(_))
        };
        for case in CASES.iter().filter(is_run) {
            for reverse in [false, true] {
                let (load, secs) = (case.load, 0.05);
                let mut server = None;
                let ask = |request, server: &mut _| {
                    answer(request, server, &mut Held::default()).unwrap()
                };
                let serve = Request::Serve {
                    load,
                    reverse,
                    at: (loopback, 0).into(),
                    secs,
                };
                let Reply::Serving(to) = ask(serve, &mut server) else {
                    panic!("{}", case.name)
                };
                let run = Request::Run {
                    load,
                    reverse,
                    to,
                    secs,
                };
                let Reply::Measured(ours) = ask(run, &mut server) else {
                    panic!("{}", case.name)
                };
                let Reply::Measured(theirs) = ask(Request::Finish, &mut server) else {
                    panic!("{}", case.name)
                };
                let is_at_server = !reverse && matches!(load, Load::Tcp { .. } | Load::Udp { .. });
                let measured = if is_at_server { theirs } else { ours };
                let values = measured.values(load);
                // The machine's time has ticks of 10 ms.
                let first = values[0];
                assert!(
                    first > 0.0 && values.iter().all(|value| value.is_finite()),
                    "{}, reverse {reverse}: {values:?}",
                    case.name
                );
            }
        }
    }

    #[test]
    fn what_is_held_stays_open() {
        let at = "127.0.0.1:0".parse().unwrap();
        for load in [Load::RoundTrips { flows: 1 }, CASES[3].load] {
            let (mut server, mut held) = (None, Held::default());
            let serve = Request::Serve {
                load,
                reverse: false,
                at,
                secs: 0.0,
            };
            let Ok(Reply::Serving(to)) = answer(serve, &mut server, &mut held) else {
                panic!("{load:?}")
            };
            for _ in 0..2 {
                let hold = Request::Hold { load, to, count: 3 };
                let reply = answer(hold, &mut server, &mut held);
                assert!(matches!(reply, Ok(Reply::Held)), "{reply:?}");
            }
            assert_eq!(held.streams.len() + held.datagrams.len(), 6);
        }
    }

    #[test]
    fn the_source_address_is_that_of_the_route() {
        let loopback: IpAddr = [127, 0, 0, 1].into();
        assert_eq!(source(loopback).unwrap(), loopback);
    }
}
