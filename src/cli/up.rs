//! `lanlet up` and `lanlet down`: a network that others attach to.

use std::fs::{DirBuilder, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::daemon::{self, Detached, Half, tell_service_manager};
use super::find::connect;
use super::forward::ForwardFlags;
use super::options::{NameOption, NetworkOptions, NewNameOption};
use super::signals::{Signals, WISHES};
use super::{Failure, check, child, logger, print};
use crate::config::{NetworkConfig, PREFIX6_LEN, PortSpec, format_duration};
use crate::control::RuntimeDir;
use crate::control::server::Server;
use crate::network::Network;
use crate::sys::signal::{Received, SignalFd};

/// How long 'down' waits for the process. It ends itself by force after half of that.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);
/// Pause between two looks whether it has ended, where the process can't be watched.
const STOP_POLL: Duration = Duration::from_millis(20);
/// Exit status of a network that had to end itself by force.
const EXIT_FORCED: u8 = 1;

/// Run a network for others to attach to
///
/// Ends on SIGINT or SIGTERM (Ctrl-C), on 'lanlet down', or when its data path fails; a second signal, or
/// five seconds, force the end. SIGHUP, SIGINT and SIGQUIT that are ignored when it starts (nohup) stay
/// ignored. Its guests are without network then, until one of the same name runs. With --detach it runs in the
/// background, and the command returns when guests can attach, or with status 1 and the reason why not.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet up
  lanlet up -d
  lanlet up --name lab --subnet 10.9.0.0/24 --dhcp-range 10.9.0.100-10.9.0.199 --domain lab.test
  lanlet up -p 8080:192.168.122.70:80 -p 5353:web:53/udp
  lanlet up --port vhost-user:/run/user/1000/web.sock,name=web
  lanlet up --dns 9.9.9.9 --lease-time 12h --lease-file none")]
pub(super) struct Args {
    #[command(flatten)]
    name: NewNameOption,
    /// Run in the background, and return when the network is ready; 'lanlet down' ends it
    #[arg(short, long, conflicts_with = "ready_fd")]
    detach: bool,
    /// Where a network in the background logs to; a file grows [default: ~/.local/state/lanlet/NAME.log]
    #[arg(long, value_name = "PATH", requires = "detach")]
    log_file: Option<PathBuf>,
    /// Write a line to this inherited descriptor when the network is ready, and close it (as s6 has it);
    /// systemd is told by NOTIFY_SOCKET without being asked
    #[arg(long, value_name = "N")]
    ready_fd: Option<i32>,
    #[command(flatten)]
    forwards: ForwardFlags,
    /// A port that is there from the start and stays: vhost-user:PATH[,name=NAME][,group=NAME] is a unix
    /// socket that a VMM or DPDK connects to as a vhost-user front-end; ,allow-guests lets one in a guest of
    /// 'lanlet exec' do so; may be repeated
    #[arg(long, value_name = "KIND:WHERE")]
    port: Vec<PortSpec>,
    #[command(flatten)]
    network: NetworkOptions,
}

/// End a running network
///
/// Returns when its process has ended, and says how many guests were attached.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet down
  lanlet down --name lab")]
pub(super) struct DownArgs {
    #[command(flatten)]
    name: NameOption,
}

/// Who is told when the network is ready.
enum Ready {
    /// Whoever reads standard output.
    Reader,
    /// Whoever waits at a descriptor, too.
    Waiter(File),
    /// The caller, whose terminal is left then for a log.
    Caller(Detached, PathBuf),
}

pub(super) fn up(args: &Args) -> Result<ExitCode, Failure> {
    // First of all, while there is one thread and no descriptor.
    let ready = match (args.detach, args.ready_fd) {
        (true, _) => match daemon::split()? {
            Half::Caller(status) => return Ok(status),
            Half::Network(detached) => Ready::Caller(detached, log_file(args)?),
        },
        (false, Some(number)) => Ready::Waiter(daemon::take_ready_fd(number)?),
        (false, None) => Ready::Reader,
    };
    let signals = Signals::hold(&WISHES)?;
    let name = args.name.get();
    let default_leases = state_file(&format!("{name}.leases"));
    if default_leases.is_none() {
        log::warn!("neither XDG_STATE_HOME nor HOME is set: leases are not kept across restarts");
    }
    let mut config = args.network.resolve(name, default_leases.clone())?;
    config.ports = args.port.clone();
    config.forwards = args.forwards.specs().cloned().collect();
    let claim = RuntimeDir::from_env().claim(name)?;
    if let Some(path) = config
        .lease_file
        .as_deref()
        .filter(|&path| Some(path) == default_leases.as_deref())
    {
        make_parent(
            path,
            "the lease file (--lease-file PATH or none says where else)",
        )?;
    }
    let socket = claim.socket().to_owned();
    let log = match &ready {
        Ready::Caller(_, path) => Some(path.as_path()),
        _ => None,
    };
    let summary = summary(&config, &socket, log);
    child::raise_open_files();
    // Beside the start, which waits for nothing either.
    let network = std::thread::scope(|scope| {
        scope.spawn(check::warn_of_guests);
        Network::start(config)
    });
    let network = Arc::new(network?);
    let end = Arc::new(
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|error| Failure::io("cannot make an eventfd")(error.into()))?,
    );
    let asked = Arc::new(Mutex::new(None));
    let on_stop = {
        let (end, asked) = (Arc::clone(&end), Arc::clone(&asked));
        move |reason: String| {
            *asked.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
            ring(&end);
        }
    };
    let server = Server::start(name, claim, Arc::clone(&network) as _, on_stop)
        .map_err(Failure::io("cannot serve the control socket"))?;
    let failed = std::thread::Builder::new()
        .name("lanlet-watch".to_owned())
        .spawn({
            let (network, end) = (Arc::clone(&network), Arc::clone(&end));
            move || {
                let error = network.failed();
                ring(&end);
                error
            }
        })
        .map_err(Failure::io("cannot start a thread"))?;
    ready.tell(&summary)?;
    let received = wait_for_end(signals.running(), &end)?;
    signals.ending(EXIT_FORCED);
    tell_service_manager("STOPPING=1");
    let reason = asked.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (received, reason) {
        (Some(received), _) => log::info!("network '{name}' is ending: {received}"),
        (None, Some(reason)) => log::info!("network '{name}' is ending: {reason}"),
        (None, None) => log::info!("network '{name}' is ending: its data path has ended"),
    }
    drop(server);
    network.stop();
    match failed.join() {
        Ok(None) => Ok(ExitCode::SUCCESS),
        Ok(Some(error)) => Err(error.into()),
        Err(_) => Err(Failure::because("the data path has failed")),
    }
}

/// Wakes [`wait_for_end`].
fn ring(end: &OwnedFd) {
    // Fails only when the counter is full, and then the bell has rung.
    let _ = rustix::io::write(end, &1u64.to_ne_bytes());
}

impl Ready {
    /// Tells it.
    ///
    /// # Errors
    /// The caller of a network in the background has gone.
    fn tell(self, summary: &str) -> Result<(), Failure> {
        let say = || {
            if !logger::is_quiet() {
                // Who reads the summary may have gone; the network is there for others.
                let _ = print(summary);
            }
        };
        match self {
            Ready::Reader => say(),
            Ready::Waiter(fd) => {
                say();
                daemon::tell_ready(fd);
            }
            Ready::Caller(detached, log) => {
                make_parent(&log, "the log (--log-file PATH says where else)")?;
                let log = daemon::open_log(&log)?;
                say();
                detached.leave(&log)?;
                let pid = std::process::id();
                log::info!("the network is up, in the background as pid {pid}");
                tell_service_manager(&format!("MAINPID={pid}"));
            }
        }
        tell_service_manager("READY=1");
        Ok(())
    }
}

/// Blocks until a signal comes or somebody rings `end`.
fn wait_for_end(signals: &SignalFd, end: &OwnedFd) -> Result<Option<Received>, Failure> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
            PollFd::new(end, PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Failure::io("cannot wait for signals")(error.into())),
        }
        let asked = !fds[1].revents().is_empty();
        if let Some(received) = signals.next()? {
            return Ok(Some(received));
        }
        if asked {
            return Ok(None);
        }
    }
}

/// Where `up` keeps a file by default: $XDG_STATE_HOME/lanlet, by the XDG base directory rules
/// ~/.local/state/lanlet. `None`: the environment names neither directory.
fn state_file(file: &str) -> Option<PathBuf> {
    let var = |key| {
        std::env::var_os(key)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let state = var("XDG_STATE_HOME").or_else(|| Some(var("HOME")?.join(".local/state")));
    Some(state?.join("lanlet").join(file))
}

/// Where a network in the background logs to.
fn log_file(args: &Args) -> Result<PathBuf, Failure> {
    if let Some(path) = &args.log_file {
        return Ok(std::path::absolute(path)?);
    }
    let path = state_file(&format!("{}.log", args.name.get())).ok_or_else(|| {
        Failure::because(
            "neither XDG_STATE_HOME nor HOME is set: say where to log with --log-file PATH",
        )
    })?;
    Ok(path)
}

/// Makes the directory that a file is to be in.
fn make_parent(path: &Path, what: &str) -> Result<(), Failure> {
    let parent = path.parent().unwrap_or(path);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(parent)
        .map_err(Failure::io(format!(
            "cannot make {} for {what}",
            parent.display()
        )))
}

/// What a newcomer needs to know of the network.
fn summary(config: &NetworkConfig, socket: &Path, log: Option<&Path>) -> String {
    let (first, last) = config.dhcp_range;
    let name = match config.name.as_str() {
        crate::config::NAME_DEFAULT => String::new(),
        name => format!(" --name {name}"),
    };
    let leases = config
        .lease_file
        .as_ref()
        .map_or("not kept across restarts".to_owned(), |path| {
            format!("kept in {}", path.display())
        });
    let dns = match config.dns.as_slice() {
        [] => "the host's resolvers".to_owned(),
        servers => servers
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", "),
    };
    let ipv6 = config.gateway6().map_or("off".to_owned(), |gateway| {
        format!("{gateway}/{PREFIX6_LEN} is the gateway; guests make their addresses (SLAAC)")
    });
    format!(
        "\
lanlet {version}: network '{network}' is up
  subnet   {subnet}, gateway {gateway}, MTU {mtu}
  IPv6     {ipv6}
  DHCP     {first} to {last}, leases of {lease_time}, {leases}
  DNS      {gateway}, forwarding to {dns}
  control  {socket}
{log_line}Attach a guest:
  lanlet qemu{name} -- -m 1G -drive file=disk.qcow2
  lanlet run{name} -- cloud-hypervisor --net fd={{fd}},mac={{mac}} --kernel vmlinuz
  lanlet exec{name} -- bash
See what goes on with 'lanlet status{name}'; {end} ends the network.
",
        end = match log {
            Some(_) => format!("'lanlet down{name}'"),
            None => "Ctrl-C".to_owned(),
        },
        log_line = log.map_or(String::new(), |log| format!(
            "  log      {}\n",
            log.display()
        )),
        version = env!("CARGO_PKG_VERSION"),
        network = config.name,
        subnet = config.subnet(),
        gateway = config.gateway,
        mtu = config.mtu,
        lease_time = format_duration(config.lease_time),
        socket = socket.display(),
    )
}

pub(super) fn down(args: &DownArgs) -> Result<ExitCode, Failure> {
    let dir = RuntimeDir::from_env();
    let mut client = connect(&args.name)?;
    let (name, pid) = (client.name().to_owned(), client.pid());
    let process = client.process();
    let guests = client.stop()?;
    drop(client);
    let deadline = Instant::now() + STOP_TIME_MAX;
    let runs = || match &process {
        // Not the name: a service manager may have started the network again by now.
        Some(process) => !has_ended(process, STOP_POLL),
        None => dir.is_claimed(&name),
    };
    while runs() {
        if Instant::now() > deadline {
            return Err(Failure::because(format!(
                "network '{name}' (pid {pid}) was asked to stop and still runs; 'kill -KILL {pid}' ends it"
            )));
        }
        std::thread::sleep(STOP_POLL);
    }
    let guests = match guests {
        0 => "no guests".to_owned(),
        1 => "one guest".to_owned(),
        more => format!("{more} guests"),
    };
    log::info!("network '{name}' (pid {pid}) has ended; it had {guests}");
    Ok(ExitCode::SUCCESS)
}

/// Whether a process has ended, after `wait` at most.
fn has_ended(process: &OwnedFd, wait: Duration) -> bool {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    let timeout = Timespec::try_from(wait).ok();
    rustix::event::poll(&mut fds, timeout.as_ref()).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_names_the_network_where_it_has_to() {
        let mut config = NetworkConfig::default();
        let text = summary(&config, Path::new("/run/lanlet/default.sock"), None);
        assert!(
            text.contains("192.168.122.0/24, gateway 192.168.122.1") && !text.contains("--name")
        );
        config.name = "lab".to_owned();
        let text = summary(&config, Path::new("/x"), Some(Path::new("/log")));
        assert!(text.contains("lanlet exec --name lab -- bash"), "{text}");
        assert!(
            text.contains("  log      /log\n") && text.contains("'lanlet down --name lab' ends")
        );
    }
}
