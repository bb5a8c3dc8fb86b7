//! `lanlet bench`: lanlet beside its peers, on this machine.
//!
//! The command itself shows and writes; everything else happens in namespaces of its own ([`world`]),
//! from which it hears, line by line, of every run ([`control`]). [`case`] is what is measured,
//! [`way`] between what, [`peer`] the load generators.

mod about;
mod agent;
mod case;
mod control;
mod costs;
mod guard;
mod html;
mod network;
mod peer;
mod plot;
mod progress;
mod resident;
mod results;
mod statistics;
mod table;
mod vm;
mod way;
mod world;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};

use clap::ValueEnum;
use clap::builder::PossibleValuesParser;
use rustix::event::{PollFd, PollFlags};

use self::case::Section;
use self::control::{Event, Plan};
use self::progress::Progress;
use self::results::Results;
use self::way::Way;
pub(super) use self::world::find;
use super::{Failure, child, print};
use crate::config::Workers;
use crate::sys::signal::SignalFd;

/// Medians of five are what a single disturbed run can't move.
const ROUNDS: u32 = 5;
/// Long enough for TCP to leave slow start a hundred times over; short, so that rounds follow closely.
const SECS: f64 = 1.0;
/// With `--quick`: whether it works, and the order of magnitude.
const SECS_QUICK: f64 = 0.1;
/// Opening so many connections takes the slow peers half a minute.
const CASE_NOT_QUICK: &str = "flows-10k";
/// Seconds per run that may be asked for.
const SECS_RANGE: std::ops::RangeInclusive<f64> = 0.05..=60.0;

/// Measure lanlet beside the kernel's bridge and NAT, pasta, slirp4netns and QEMU
///
/// Builds guests, a host and an outside in namespaces of its own and measures between them: TCP with 1
/// and 8 streams, UDP by size, latency, connections per second, and latency and processor time with
/// 10 to 10,000 flows; then what memory and time lanlet itself takes. Needs no root and no other program than 'ip'; peers are measured where they
/// are installed. Every round measures each case on all paths in turn; figures are medians, with
/// half of the range as spread. Nothing leaves the machine, nothing is left behind.
///
/// All connections are opened by the guest; "outside to guest" is data that comes back. Whoever
/// receives counts, from its first byte on. A run that hangs is ended, and counts as failed. "CPU" is
/// what the whole machine works per round trip, both ends included: keep it idle otherwise.
///
/// Exits with 1 if lanlet itself lacks a figure.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet bench
  lanlet bench --quick
  lanlet bench --html report.html --json report.json
  lanlet bench --only lanlet,kernel --cases tcp,rtt --rounds 9 --secs 2
  lanlet bench --only lanlet --base ./lanlet-of-yesterday
  lanlet bench --only lanlet,lanlet-vhost-user,kernel --sections vm-to-vm --guest-image lab/out
  lanlet bench --only lanlet,kernel --cases tcp --workers auto")]
pub(super) struct Args {
    /// How often everything is measured [default: 5; 1 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Seconds of a run, 0.05 to 60 [default: 1; 0.1 with --quick]
    #[arg(long, value_name = "N", value_parser = parse_secs)]
    secs: Option<f64>,
    /// The paths to measure [default: all that are installed]
    #[arg(long, value_name = "PATH,…", value_delimiter = ',')]
    only: Vec<Way>,
    /// The parts of the report [default: all]
    #[arg(long, value_name = "SECTION,…", value_delimiter = ',')]
    sections: Vec<Section>,
    /// The cases to measure, single ones or groups [default: all]
    #[arg(long, value_name = "CASE,…", value_delimiter = ',',
          value_parser = PossibleValuesParser::new(case::words()))]
    cases: Vec<String>,
    /// One short round: whether everything works, and roughly how fast
    #[arg(long)]
    quick: bool,
    /// Another lanlet program to measure beside this one, say of the version before
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
    /// Measure this program with so many workers, too
    #[arg(long, value_name = "N|auto")]
    workers: Option<Workers>,
    /// Directory with vmlinuz and initrd.gz, as lab/guest-image/build makes them, for QEMU guests
    #[arg(long, value_name = "DIR")]
    guest_image: Option<PathBuf>,
    /// Write every figure to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a report with plots to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// The processes inside.
#[derive(clap::Subcommand, Debug)]
enum PeerCommand {
    /// Enters the namespaces.
    World {
        /// What to measure, as JSON.
        plan: String,
    },
    /// Controls everything in them.
    Control {
        /// What to measure, as JSON.
        plan: String,
    },
    /// Makes load.
    Agent,
    /// Becomes another program somewhere.
    Enter(world::EnterArgs),
    /// Tells whether the hot path has become slower.
    Guard(guard::GuardArgs),
}

/// The rest of `bench-peer`'s command line.
#[derive(clap::Args, Debug)]
pub(super) struct PeerArgs {
    #[command(subcommand)]
    command: PeerCommand,
}

pub(super) fn peer(args: &PeerArgs) -> Result<ExitCode, Failure> {
    match &args.command {
        PeerCommand::World { plan } => world::enter(plan),
        PeerCommand::Control { plan } => control::control(plan),
        PeerCommand::Agent => peer::run(),
        PeerCommand::Enter(args) => world::become_command(args),
        PeerCommand::Guard(args) => guard::guard(args),
    }
}

fn parse_secs(text: &str) -> Result<f64, String> {
    let secs = text.parse().ok().filter(|secs| SECS_RANGE.contains(secs));
    secs.ok_or_else(|| format!("{} to {}", SECS_RANGE.start(), SECS_RANGE.end()))
}

impl Args {
    fn plan(&self) -> Result<Plan, Failure> {
        let base = self.base.as_deref().map(program).transpose()?;
        let mut ways = match self.only.is_empty() {
            true => Way::value_variants().to_vec(),
            false => self.only.clone(),
        };
        match base {
            Some(_) => ways.push(Way::Base),
            None if self.only.contains(&Way::Base) => {
                return Err(Failure::Usage("the path 'base' needs --base".to_owned()));
            }
            None => ways.retain(|way| *way != Way::Base),
        }
        match self.workers {
            Some(_) => ways.push(Way::Workers),
            None if self.only.contains(&Way::Workers) => {
                let missing = "the path 'lanlet-workers' needs --workers";
                return Err(Failure::Usage(missing.to_owned()));
            }
            None => ways.retain(|way| *way != Way::Workers),
        }
        // It is of VMs alone, and would have nothing to say but that.
        if self.guest_image.is_none() && self.only.is_empty() {
            ways.retain(|way| *way != Way::VhostUser);
        }
        ways.sort_unstable();
        ways.dedup();
        let (rounds, secs) = match self.quick {
            true => (1, SECS_QUICK),
            false => (ROUNDS, SECS),
        };
        let cases = case::select(&self.cases).into_iter();
        let is_wanted = |name: &str| {
            !self.quick || name != CASE_NOT_QUICK || self.cases.iter().any(|word| word == name)
        };
        Ok(Plan {
            ways,
            cases: cases
                .map(|case| case.name.to_owned())
                .filter(|name| is_wanted(name))
                .collect(),
            sections: match self.sections.is_empty() {
                true => Section::ALL.to_vec(),
                false => self.sections.clone(),
            },
            rounds: self.rounds.unwrap_or(rounds),
            secs: self.secs.unwrap_or(secs),
            base,
            workers: self.workers.as_ref().map(Workers::to_string),
            guest_image: self.guest_image.as_deref().map(image).transpose()?,
        })
    }
}

/// The absolute path of a program.
fn program(path: &Path) -> Result<PathBuf, Failure> {
    let found = path.canonicalize().ok().filter(|path| path.is_file());
    found.ok_or_else(|| Failure::Usage(format!("--base: there is no program {}", path.display())))
}

/// The absolute path of a directory with a guest image.
fn image(path: &Path) -> Result<PathBuf, Failure> {
    for file in [vm::KERNEL, vm::INITRD] {
        if !path.join(file).is_file() {
            let path = path.display();
            let error = format!("--guest-image: there is no {file} in {path} (make image)");
            return Err(Failure::Usage(error));
        }
    }
    path.canonicalize().map_err(Failure::from)
}

/// A file to write to, made before anything is measured for it.
fn create(path: Option<&PathBuf>) -> Result<Option<File>, Failure> {
    let create = |path: &PathBuf| {
        File::create(path).map_err(Failure::io(format!("cannot write {}", path.display())))
    };
    path.map(create).transpose()
}

pub(super) fn bench(args: &Args) -> Result<ExitCode, Failure> {
    let plan = args.plan()?;
    let json = create(args.json.as_ref())?;
    let html = create(args.html.as_ref())?;
    let signals = child::block_signals()?;
    child::raise_open_files();
    let text = serde_json::to_string(&plan).map_err(std::io::Error::from)?;
    let child = child::this_program()
        .args(["bench-peer", "world", &text])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(Failure::io("cannot start a process"))?;
    let mut results = Results::new(plan, about::about(args.base.as_deref()));
    let ended_by = listen(child, signals.running(), &mut results)?;
    results.is_cut_short = ended_by.is_some();
    print(&table::render(&results))?;
    if let Some(mut file) = json {
        let text = results.to_json().map_err(std::io::Error::from)?;
        writeln!(file, "{text}")?;
    }
    if let Some(mut file) = html {
        file.write_all(html::render(&results).as_bytes())?;
    }
    Ok(
        match ended_by.and_then(|signal| u8::try_from(128 + signal).ok()) {
            Some(code) => ExitCode::from(code),
            None if results.lanlet_is_whole() => ExitCode::SUCCESS,
            None => ExitCode::FAILURE,
        },
    )
}

/// Takes in what happens until the world ends. A signal ends it, by its pipe; the signal's number.
fn listen(
    mut world: Child,
    signals: &SignalFd,
    results: &mut Results,
) -> Result<Option<i32>, Failure> {
    let failed = |error: rustix::io::Errno| Failure::io("cannot watch the bench")(error.into());
    let mut progress = Progress::new(&results.plan);
    let mut pipe = world.stdin.take();
    let mut stdout = world.stdout.take().ok_or(Failure::Reported)?;
    let (mut ended_by, mut unread) = (None, Vec::new());
    loop {
        let mut fds = [
            PollFd::new(&stdout, PollFlags::IN),
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
        ];
        let tick = progress.tick();
        let waited = rustix::event::poll(&mut fds, Some(&tick));
        let has_news = !fds[0].revents().is_empty();
        match waited {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error)),
        }
        while let Some(received) = signals.next()? {
            if received.signal != libc::SIGWINCH {
                ended_by.get_or_insert(received.signal);
                drop(pipe.take());
            }
        }
        if has_news {
            let mut buffer = [0; 4096];
            match stdout.read(&mut buffer)? {
                0 => break,
                count => unread.extend_from_slice(&buffer[..count]),
            }
            while let Some(end) = unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = unread.drain(..=end).collect();
                let event: Event = serde_json::from_slice(&line).map_err(std::io::Error::from)?;
                progress.show(&event);
                results.take(event);
            }
        }
    }
    progress.end();
    let status = world
        .wait()
        .map_err(Failure::io("cannot wait for the bench"))?;
    match ended_by {
        // It has said why.
        None if !status.success() => Err(Failure::Reported),
        _ => Ok(ended_by),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn plan(words: &[&str]) -> Result<Plan, Failure> {
        let words = ["bench"].iter().chain(words);
        Command::try_parse_from(words).unwrap().args.plan()
    }

    #[test]
    fn without_options_everything_is_measured() {
        let plan = plan(&[]).unwrap();
        assert_eq!((plan.rounds, plan.secs), (ROUNDS, SECS));
        assert_eq!(plan.cases.len(), case::CASES.len());
        assert_eq!(plan.ways.len(), Way::value_variants().len() - 3);
        assert!(!plan.ways.contains(&Way::Base) && !plan.ways.contains(&Way::Workers));
    }

    #[test]
    fn options_narrow_it() {
        let plan = plan(&["--quick", "--only", "kernel,lanlet", "--rounds", "2"]).unwrap();
        assert_eq!(plan.ways, [Way::Lanlet, Way::Kernel]);
        assert_eq!((plan.rounds, plan.secs), (2, SECS_QUICK));
        assert!(!plan.cases.iter().any(|name| name == CASE_NOT_QUICK));
        let vms = self::plan(&["--only", "lanlet-vhost-user", "--sections", "vm-to-vm"]).unwrap();
        assert_eq!(vms.ways, [Way::VhostUser]);
        let single = self::plan(&["--quick", "--cases", CASE_NOT_QUICK]).unwrap();
        assert_eq!(single.cases, [CASE_NOT_QUICK]);
    }

    #[test]
    fn the_base_is_measured_where_it_is_named() {
        assert!(matches!(plan(&["--only", "base"]), Err(Failure::Usage(_))));
        assert!(matches!(plan(&["--base", "/none"]), Err(Failure::Usage(_))));
        let with = plan(&["--only", "lanlet", "--base", "/proc/self/exe"]).unwrap();
        assert_eq!(with.ways, [Way::Lanlet, Way::Base]);
        assert!(plan(&["--only", "lanlet-workers"]).is_err());
        let with = plan(&["--only", "lanlet", "--workers", "2"]).unwrap();
        assert_eq!(with.ways, [Way::Lanlet, Way::Workers]);
    }

    #[test]
    fn seconds_have_limits() {
        assert_eq!(parse_secs("0.5"), Ok(0.5));
        for wrong in ["0", "61", "x", "NaN", "-1"] {
            assert!(parse_secs(wrong).is_err(), "{wrong}");
        }
    }
}
