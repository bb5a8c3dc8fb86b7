//! Where it is measured: namespaces of the bench's own, which no packet leaves.
//!
//! ```text
//!   the "host": lanlet, pasta, ..., the kernel's NAT      outside: the servers
//!   up0 198.51.100.1/24  ----------- veth -----------  up1 198.51.100.2/24
//!       2001:db8:1::1/64                                   2001:db8:1::2/64
//!   default via 198.51.100.2, 2001:db8:1::2            203.0.113.1/32, 2001:db8:2::1/128
//! ```
//! The servers have second addresses, as pasta maps the default gateway's to the host.
//!
//! Three processes make it. The command ([`super`]) has no namespaces. [`enter`] enters fresh user,
//! network, mount and pid namespaces and starts the controller ([`super::control`]), which is the
//! first process there: when it ends, the kernel kills everything in it. It ends when its standard
//! input, a pipe of the command, breaks. So nothing outlives the command, whatever ends it.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{getegid, geteuid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::super::{Failure, child, replace_in};
use crate::sys::{namespace, tun};
use crate::tap::TapError;

/// The servers' addresses.
pub(super) const SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1));
pub(super) const SERVER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1));
/// The host's own, which the outside connects to.
pub(super) const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));
pub(super) const HOST6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1));
/// The resolver that guests are told of; nothing is resolved.
pub(super) const RESOLVER: &str = "198.51.100.2";
/// The host's interface to the outside.
pub(super) const UPLINK: &str = "up0";
/// The namespace with the servers.
pub(super) const OUTSIDE: &str = "outside";
/// Where `ip` keeps names of namespaces.
const NETNS: &str = "/run/netns";
/// Directories that an ordinary user's PATH lacks.
const SBIN: &str = "/usr/local/sbin:/usr/sbin:/sbin";
/// Who an ordinary user below the world's root is.
const USER: u32 = 1000;

/// Enters the namespaces and becomes the parent of the controller, which gets `settings`.
pub(super) fn enter(settings: &str) -> Result<ExitCode, Failure> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let flags =
        UnshareFlags::NEWUSER | UnshareFlags::NEWNET | UnshareFlags::NEWNS | UnshareFlags::NEWPID;
    namespace::unshare_all(flags)
        .and_then(|()| namespace::map_to_root(uid, gid))
        .map_err(|error| TapError::namespace(&error))?;
    let status = child::this_program()
        .args(["bench-peer", "control", settings])
        .status()
        .map_err(Failure::io("cannot start a process"))?;
    match status.success() {
        true => Ok(ExitCode::SUCCESS),
        false => Err(Failure::Reported),
    }
}

/// How to become another program: in a network namespace, as a user without rights, with a tap.
#[derive(clap::Args, Debug)]
pub(super) struct EnterArgs {
    /// Name of the network namespace.
    #[arg(long)]
    net: Option<String>,
    /// In a user namespace below the world's: without any right over the world's network.
    #[arg(long)]
    user: bool,
    /// Name of a tap made in the network namespace; the process itself stays where it is, and finds
    /// the descriptor's number for `{fd}`.
    #[arg(long)]
    tap: Option<String>,
    /// The tap has virtio-net headers.
    #[arg(long, requires = "tap")]
    vnet: bool,
    /// The command.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Becomes the command. Returns only if that fails.
pub(super) fn become_command(args: &EnterArgs) -> Result<ExitCode, Failure> {
    let mut command = args.command.clone();
    let before = fs::File::open("/proc/self/ns/net").map_err(Failure::io("/proc/self/ns/net"))?;
    if let Some(name) = &args.net {
        let file = fs::File::open(Path::new(NETNS).join(name)).map_err(Failure::io(name))?;
        enter_net(&file)?;
    }
    // Kept open by its number until the command has it.
    let tap = match &args.tap {
        Some(name) => {
            let opened = match args.vnet {
                true => tun::open_vnet(name, false),
                false => tun::open_plain(name),
            };
            Some(opened.map_err(Failure::io("cannot make a tap"))?.0)
        }
        None => None,
    };
    if let Some(tap) = &tap {
        enter_net(&before)?;
        rustix::io::fcntl_setfd(tap, rustix::io::FdFlags::empty())
            .map_err(|error| Failure::io("cannot pass the tap on")(error.into()))?;
        let number = tap.as_raw_fd().to_string();
        for word in &mut command {
            *word = replace_in(word, "{fd}", &number);
        }
    }
    if args.user {
        namespace::unshare_all(UnshareFlags::NEWUSER)
            .and_then(|()| namespace::map_ids(USER, 0, 0))
            .map_err(|error| TapError::namespace(&error))?;
    }
    let (program, arguments) = command.split_first().ok_or(Failure::Reported)?;
    let error = Command::new(program).args(arguments).exec();
    Ok(child::cannot_run(program, &error))
}

fn enter_net(file: &fs::File) -> Result<(), Failure> {
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|error| Failure::io("cannot enter a network namespace")(error.into()))
}

/// The namespaces, seen from the controller.
pub(super) struct World {
    /// This program, by a path that works for all who are in the world.
    program: PathBuf,
    /// For logs and control sockets.
    dir: PathBuf,
}

impl World {
    /// Makes it.
    ///
    /// # Errors
    /// What is missing, with the remedy.
    pub(super) fn new() -> Result<Self, Failure> {
        let program = std::env::current_exe().map_err(Failure::io("cannot find this program"))?;
        let io = |error: rustix::io::Errno| std::io::Error::from(error);
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .map_err(|error| Failure::io("cannot make mounts private")(io(error)))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        // A container may have covered parts of /proc, and then forbids a fresh one: the old one will
        // do, unless its /proc/sys is read-only.
        if let Err(error) = mount("proc", "/proc", "proc", flags | MountFlags::NOEXEC, None) {
            log::debug!("cannot mount /proc: {error}");
        }
        mount("tmpfs", "/run", "tmpfs", flags, None)
            .map_err(|error| Failure::io("cannot mount a tmpfs on /run")(io(error)))?;
        let dir = PathBuf::from("/run/bench");
        fs::create_dir(&dir)?;
        let world = Self { program, dir };
        if find("ip").is_none() {
            return Err(Failure::because(
                "'ip' is not installed, and the bench makes its namespaces with it (Debian: iproute2)",
            ));
        }
        world.build().map_err(Failure::because)?;
        Ok(world)
    }

    fn build(&self) -> Result<(), String> {
        self.add_namespace(OUTSIDE)?;
        // Indices of their own, as in lab/world: a veth with the same one at both ends is up late.
        ip(
            None,
            &format!(
                "link set lo up
                link add {UPLINK} index 100 type veth peer name up1 netns {OUTSIDE}
                address add {HOST}/24 dev {UPLINK}
                link set {UPLINK} up
                route add default via 198.51.100.2"
            ),
        )?;
        ip(
            Some(OUTSIDE),
            &format!(
                "link set lo up
                address add 198.51.100.2/24 dev up1
                address add {SERVER}/32 dev lo
                link set up1 up"
            ),
        )?;
        // Without IPv6 there are no figures of it, and no more is lost.
        let v6 = ip(
            Some(OUTSIDE),
            &format!(
                "address add 2001:db8:1::2/64 dev up1 nodad
                address add {SERVER6}/128 dev lo nodad"
            ),
        )
        .and_then(|()| {
            ip(
                None,
                &format!(
                    "address add {HOST6}/64 dev {UPLINK} nodad
                    route add default via 2001:db8:1::2"
                ),
            )
        });
        if let Err(error) = v6 {
            log::debug!("no IPv6: {error}");
        }
        Ok(())
    }

    /// Makes a network namespace that has nothing yet.
    pub(super) fn add_namespace(&self, name: &str) -> Result<(), String> {
        run("ip", &["netns", "add", name], "")
    }

    /// Where a process's words go.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// A directory that only this user may enter.
    pub(super) fn private_dir(&self, name: &str) -> Result<PathBuf, String> {
        let dir = self.dir.join(name);
        let made = fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&dir);
        made.map_err(|error| format!("{}: {error}", dir.display()))?;
        Ok(dir)
    }

    /// This program.
    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    /// A command at a place: the words follow.
    pub(super) fn at(&self, place: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["bench-peer", "enter"]).args(place).arg("--");
        command
    }

    /// The load generators at a place.
    pub(super) fn agent_at(&self, place: &[&str]) -> Command {
        let mut command = self.at(place);
        command.args(self.agent_words());
        command
    }

    /// The load generators' command line.
    pub(super) fn agent_words(&self) -> [OsString; 3] {
        [
            self.program.clone().into(),
            "bench-peer".into(),
            "agent".into(),
        ]
    }
}

/// The path of a network namespace.
pub(super) fn netns_path(name: &str) -> String {
    format!("{NETNS}/{name}")
}

/// Runs lines of `ip -batch`, in a namespace.
pub(super) fn ip(namespace: Option<&str>, lines: &str) -> Result<(), String> {
    let place = namespace.map(|name| ["-netns", name]);
    let mut words: Vec<&str> = place.into_iter().flatten().collect();
    words.extend(["-batch", "-"]);
    run("ip", &words, lines)
}

/// Runs a program to its end with `input`; its words are the error if it fails.
pub(super) fn run(program: &str, words: &[&str], input: &str) -> Result<(), String> {
    let path = installed(program)?;
    let failed = |error: std::io::Error| format!("{program}: {error}");
    let mut child = Command::new(path)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends early says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr);
            let first = said.lines().find(|line| !line.trim().is_empty());
            Err(format!("{program}: {}", first.unwrap_or("failed")))
        }
    }
}

/// A program's path.
///
/// # Errors
/// It is not there.
pub(super) fn installed(program: &str) -> Result<PathBuf, String> {
    find(program).ok_or_else(|| format!("{program} is not installed"))
}

/// A program's path: by PATH, then where an ordinary user's has no entry.
pub(in crate::cli) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let directories = path.split(':').chain(SBIN.split(':'));
    directories
        .map(|directory| Path::new(directory).join(program))
        .find(|path| {
            let mode = fs::metadata(path).map(|data| data.permissions().mode());
            path.is_file() && mode.is_ok_and(|mode| mode & 0o111 != 0)
        })
}
