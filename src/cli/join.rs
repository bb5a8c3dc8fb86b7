//! `lanlet join`: a network namespace that is there already becomes a guest.
//!
//! A child (`join-init`) enters the namespace, makes the link, gives its tap to the network and sets the
//! address. The link lives as long as the network or this process hold the tap: until a signal ends this
//! process, or the namespace ends. A network that was started again has it again, as with `exec`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::exec::{NewGuest, Wanted, no_address};
use super::forward::ForwardFlags;
use super::lan::{Lan, LanFlags};
use super::options::{NetworkOptions, PortFlags};
use super::signals::Signals;
use super::{Failure, child, print};
use crate::sys::small_file;
use crate::tap::guest::GUEST_IFNAME;

/// Longest name of a link: IFNAMSIZ without its NUL.
const IFNAME_LEN_MAX: usize = 15;
/// How often a path is looked at for its namespace: nothing tells when a mount goes.
const PATH_POLL: Duration = Duration::from_secs(1);

/// Make a guest of a network namespace that is there already
///
/// The namespace is that of a process, or one that a path leads to (/run/netns/NAME, /proc/PID/ns/net). It
/// gets a link on the network, with an address and, if it has none, a default route. The command stays
/// in the foreground, and the link goes when it ends, which it does when the process or the path is gone. The namespace has to be yours: made in a user namespace of yours, or you are root. Which
/// resolver its programs ask is not changed: the gateway is one.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet join $(podman inspect -f '{{.State.Pid}}' web)
  lanlet join --name lab --ifname lab0 /run/netns/blue")]
pub(super) struct Args {
    #[command(flatten)]
    lan: LanFlags,
    #[command(flatten)]
    port: PortFlags,
    #[command(flatten)]
    forwards: ForwardFlags,
    /// Name of the link in the namespace
    #[arg(long, value_name = "NAME", default_value = GUEST_IFNAME, value_parser = parse_ifname)]
    ifname: String,
    /// A process, by its number, or a path to a network namespace
    #[arg(value_name = "PID|PATH")]
    namespace: String,
    #[command(flatten)]
    network: NetworkOptions,
}

fn parse_ifname(text: &str) -> Result<String, String> {
    let allowed = |c: char| !c.is_whitespace() && !"/:%".contains(c) && !c.is_control();
    let fits = (1..=IFNAME_LEN_MAX).contains(&text.len()) && ![".", ".."].contains(&text);
    match fits && text.chars().all(allowed) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "a link's name has 1 to {IFNAME_LEN_MAX} bytes, without spaces, '/', ':' and '%'"
        )),
    }
}

/// How long the namespace is there.
enum Life {
    /// As long as the process.
    Process(OwnedFd),
    /// As long as the path leads to it.
    Path(PathBuf, (u64, u64)),
}

impl Life {
    fn is_over(&self) -> bool {
        match self {
            Life::Process(process) => {
                let mut fds = [PollFd::new(process, PollFlags::IN)];
                rustix::event::poll(&mut fds, Some(&Timespec::default())).is_ok_and(|n| n > 0)
            }
            Life::Path(path, id) => {
                let now = rustix::fs::stat(path).ok();
                now.is_none_or(|stat| (stat.st_dev, stat.st_ino) != *id)
            }
        }
    }
}

/// Opens the namespace.
fn open(text: &str) -> Result<(OwnedFd, Life), Failure> {
    let pid = text.parse().ok().and_then(Pid::from_raw);
    let Some(pid) = pid else {
        let path = PathBuf::from(text);
        let file = small_file::open(&path).map_err(Failure::io(path.display()))?;
        let stat = rustix::fs::fstat(&file).map_err(io::Error::from)?;
        let id = (stat.st_dev, stat.st_ino);
        return Ok((file.into(), Life::Path(path, id)));
    };
    let failed = || Failure::io(format!("process {text}"));
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| failed()(error.into()))?;
    let path = format!("/proc/{text}/ns/net");
    let namespace = small_file::open(Path::new(&path)).map_err(failed())?;
    let life = Life::Process(process);
    // It was this process's while that lived: its number was nobody else's.
    if life.is_over() {
        return Err(Failure::because(format!("process {text} has ended")));
    }
    Ok((namespace.into(), life))
}

pub(super) fn join(args: &Args) -> Result<ExitCode, Failure> {
    let signals = child::block_signals()?;
    let (namespace, life) = open(&args.namespace)?;
    let mut lan = Lan::open("join", &args.lan, &args.network)?;
    let mac = args.port.mac.unwrap_or_else(|| lan.make_mac());
    let wanted = Wanted {
        command: &[],
        queues: args.port.queues(),
        no_offload: args.port.no_offload,
        root: false,
    };
    let mut guest = NewGuest::join(namespace.as_fd(), &args.ifname, &wanted)?;
    drop(namespace);
    let mut tap = guest.tap.take().ok_or(Failure::Reported)?;
    if let Life::Process(process) = &life {
        tap.process = process.try_clone().ok();
    }
    let (_, address) = lan.attach_tap(tap, args.port.port(Some(mac)))?;
    lan.add_forwards(&args.forwards, mac)?;
    let address = address.ok_or_else(no_address)?;
    let (own, gateway) = (address.address, address.gateway);
    let configured = guest.start(mac, String::new(), address)?.wait();
    let configured = configured.map_err(Failure::io("cannot wait for a process"))?;
    if !configured.success() {
        return Err(Failure::Reported);
    }
    print(&format!(
        "{} of {}: {own}, gateway and DNS server {gateway}\n",
        args.ifname, args.namespace
    ))?;
    if let Life::Path(path, _) = &life
        && let Ok(name) = path.strip_prefix("/run/netns")
    {
        log::info!(
            "'ip netns exec' takes /etc/netns/{}/resolv.conf for that namespace's own",
            name.display()
        );
    }
    stay(&mut lan, &life, &signals)
}

/// Until a signal comes or the namespace ends.
fn stay(lan: &mut Lan, life: &Life, signals: &Signals) -> Result<ExitCode, Failure> {
    let received = signals.running();
    let mut attachment = lan.attachment();
    loop {
        let mut fds = vec![PollFd::from_borrowed_fd(received.as_fd(), PollFlags::IN)];
        if let Life::Process(process) = life {
            fds.push(PollFd::new(process, PollFlags::IN));
        }
        let own = fds.len();
        let watched = attachment.as_ref().map(|attachment| attachment.fds());
        let watched = watched.into_iter().flatten();
        fds.extend(watched.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let timeouts = [
            attachment
                .as_ref()
                .and_then(|attachment| attachment.timeout()),
            matches!(life, Life::Path(..)).then_some(PATH_POLL),
        ];
        let timeout = timeouts.into_iter().flatten().min();
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Failure::io("cannot wait")(error.into())),
        }
        let ready = fds[own..].iter().any(|fd| !fd.revents().is_empty());
        let mut end = None;
        while let Some(received) = received.next()? {
            if ![libc::SIGWINCH, libc::SIGUSR1, libc::SIGUSR2].contains(&received.signal) {
                end = Some(received);
            }
        }
        if let Some(received) = end {
            log::info!("ends by {received}");
            break;
        }
        if life.is_over() {
            log::info!("the namespace is gone");
            break;
        }
        if let Some(attachment) = &mut attachment {
            attachment.advance(ready);
        }
    }
    signals.ending(0);
    lan.drain();
    Ok(ExitCode::SUCCESS)
}
