//! `lanlet demo`: two real VMs on a LAN, talking to each other and to the outside, with no root.
//!
//! Two processes share the work. The outer one makes a file to fetch and starts the lab's world (a
//! small Internet in namespaces of the user's own: `lab/world`). In it, below another user namespace
//! that has no right over the world's network, runs the inner one ([`steps`]): a network and two QEMU
//! guests. The outer holds a pipe to the inner; when it breaks, the inner ends, and with it the world.

mod guest;
mod progress;
mod steps;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags};

use super::{Failure, child, print};

/// The file that the guests fetch: large enough for TCP to leave slow start, small enough for a guest
/// without KVM to hash in a second.
const FILE_BYTES: usize = 8 * 1024 * 1024;
/// Its name on the web server outside.
const FILE_NAME: &str = "file";

/// Show two QEMU guests on a network: leases, pings, a download, throughput
///
/// Boots two small Linux guests, each of which takes a lease, pings the other and fetches a file
/// through the NAT from a server outside, compared by checksum; then measures throughput. Everything
/// runs in namespaces of its own: nothing leaves the machine, nothing is left behind. Needs the lab of
/// the source tree ('make demo' prepares it). Exits with 1 if any step fails.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet demo
  lanlet demo --lab ~/src/lanlet/lab --accel kvm")]
pub(super) struct Args {
    /// The lab's directory [default: $LANLET_LAB, ./lab, or beside the program]
    #[arg(long, value_name = "DIR")]
    lab: Option<PathBuf>,
    /// QEMU's accelerator for the guests
    #[arg(long, value_name = "ACCEL", default_value = "tcg")]
    accel: String,
    /// Runs the guests: this process is in the world, and the served file here.
    #[arg(long, value_name = "DIR", hide = true)]
    inside: Option<PathBuf>,
}

pub(super) fn demo(args: &Args) -> Result<ExitCode, Failure> {
    let lab = find_lab(args.lab.as_deref())?;
    match &args.inside {
        Some(files) => {
            end_with_parent()?;
            steps::run(&lab, &args.accel, files)
        }
        None => outside(args, &lab),
    }
}

/// The lab's directory, with the guest image built.
fn find_lab(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let beside = |exe: PathBuf| {
        let own = exe.ancestors().skip(1).take(3).map(|dir| dir.join("lab"));
        own.collect::<Vec<_>>()
    };
    let environment = std::env::var_os("LANLET_LAB").filter(|dir| !dir.is_empty());
    let candidates = match (given, environment) {
        (Some(dir), _) => vec![dir.to_owned()],
        (None, Some(dir)) => vec![dir.into()],
        (None, None) => {
            let mut dirs = vec![PathBuf::from("lab")];
            dirs.extend(std::env::current_exe().map(beside).unwrap_or_default());
            dirs
        }
    };
    let found = candidates.iter().find(|dir| dir.join("world").is_file());
    let lab = found.ok_or_else(|| {
        Failure::because(format!(
            "no lab at {}: name the source tree's lab directory with --lab",
            candidates[0].display()
        ))
    })?;
    for part in ["vmlinuz", "initrd.gz"] {
        if !lab.join("out").join(part).is_file() {
            return Err(Failure::because(format!(
                "{}/out has no {part}: run 'make image' (or {}/guest-image/build)",
                lab.display(),
                lab.display()
            )));
        }
    }
    lab.canonicalize().map_err(Failure::io(lab.display()))
}

/// A directory that goes with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, Failure> {
        let dir = std::env::temp_dir().join(format!("lanlet-demo-{}", std::process::id()));
        std::fs::create_dir(&dir).map_err(Failure::io(format!("cannot make {}", dir.display())))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Writes bytes that look random and are the same every time (xorshift64, Marsaglia 2003).
fn write_file(path: &Path) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..FILE_BYTES / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes())?;
    }
    file.flush()
}

fn outside(args: &Args, lab: &Path) -> Result<ExitCode, Failure> {
    let signals = child::block_signals()?;
    let files = Scratch::new()?;
    write_file(&files.0.join(FILE_NAME)).map_err(Failure::io("cannot write the file to fetch"))?;
    let program = std::env::current_exe().map_err(Failure::io("cannot find this program"))?;
    print(&format!(
        "lanlet {}: two VMs on one LAN, as uid {}, no root\n",
        env!("CARGO_PKG_VERSION"),
        rustix::process::geteuid()
    ))?;
    let world = child::init_command()
        .arg(lab.join("world"))
        .arg("--http")
        .arg(&files.0)
        .args(["--iperf", "--"])
        .arg(lab.join("as-user"))
        .arg(program)
        .args(["demo", "--accel", &args.accel, "--lab"])
        .arg(lab)
        .arg("--inside")
        .arg(&files.0)
        .stdin(Stdio::piped())
        .spawn()
        .map_err(Failure::io("cannot start the lab's world"))?;
    wait(world, signals.running())
}

/// Waits for the world. A signal breaks the pipe to the inner process, which ends everything.
fn wait(mut world: Child, signals: &crate::sys::signal::SignalFd) -> Result<ExitCode, Failure> {
    let failed = |error: rustix::io::Errno| Failure::io("cannot watch the world")(error.into());
    let pid = Pid::from_child(&world);
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
    let mut pipe = world.stdin.take();
    let mut ended_by = None;
    loop {
        let mut fds = [
            PollFd::new(&process, PollFlags::IN),
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
        ];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, None)).map_err(failed)?;
        let exited = !fds[0].revents().is_empty();
        while let Some(received) = signals.next()? {
            if received.signal != libc::SIGWINCH {
                ended_by.get_or_insert(received.signal);
                drop(pipe.take());
            }
        }
        if exited {
            let status = world
                .wait()
                .map_err(Failure::io("cannot wait for the world"))?;
            return Ok(
                match ended_by.and_then(|signal| u8::try_from(128 + signal).ok()) {
                    Some(code) => ExitCode::from(code),
                    None if status.success() => ExitCode::SUCCESS,
                    None => ExitCode::FAILURE,
                },
            );
        }
    }
}

/// Ends this process when standard input, a pipe of the outer process, breaks.
fn end_with_parent() -> Result<(), Failure> {
    std::thread::Builder::new()
        .name("lanlet-parent".to_owned())
        .spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            std::process::exit(1);
        })
        .map(drop)
        .map_err(Failure::io("cannot start a thread"))
}
