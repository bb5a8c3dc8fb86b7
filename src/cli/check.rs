//! `lanlet check`: what this machine can do, tried out rather than guessed.

use std::fmt::Write;
use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;

use rustix::net::{AddressFamily, SocketType, ipproto};
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use super::exec::{NewGuest, Wanted};
use super::{Failure, bench, print, qemu};
use crate::config::NetworkConfig;
use crate::control::RuntimeDir;
use crate::network::open_files_wanted;
use crate::sys::{small_file, userfault};
use crate::tap::{Helper, TapError, WireKind, WireOptions};

/// Show what this machine can do, and what to change where it can't
///
/// Every line is tried, not guessed; then comes what that means for each command. Exits with 0 if 'up',
/// 'run' and 'exec' will work, with 1 if not. What is only a 'note' works, with less comfort.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet check
  lanlet check --json | jq -r '.commands[] | select(.verdict != \"ok\") | .command'")]
pub(super) struct Args {
    /// The same as JSON
    #[arg(long)]
    json: bool,
}

/// How one thing is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
enum Verdict {
    #[serde(rename = "ok")]
    Good,
    /// Works with less comfort.
    #[serde(rename = "note")]
    Note,
    /// What needs it won't work.
    #[serde(rename = "fail")]
    Bad,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Verdict::Good => "ok",
            Verdict::Note => "note",
            Verdict::Bad => "FAIL",
        }
    }
}

/// As much of resolv.conf as a network reads.
const RESOLV_CONF_LEN_MAX: usize = 64 * 1024;
const TAPS: &str = "taps for VMMs";
const GUESTS: &str = "namespace guests";
const DIRECTORY: &str = "runtime directory";
const PING: &str = "ping to outside";
const RESOLVERS: &str = "resolvers";
const FILES: &str = "open files";
const QEMU: &str = "QEMU";
const IP: &str = "iproute2";
const MEMORY: &str = "vhost-user memory";

/// What each command needs: without the first it does not work, with the others it works better.
const COMMANDS: [(&str, &[&str], &[&str]); 8] = [
    ("up", &[DIRECTORY], &[PING, RESOLVERS, FILES]),
    ("run", &[TAPS], &[PING, RESOLVERS, FILES]),
    (
        "run --vhost-user",
        &[DIRECTORY, MEMORY],
        &[PING, RESOLVERS, FILES],
    ),
    ("qemu", &[TAPS, QEMU], &[PING, RESOLVERS, FILES]),
    (
        "qemu --vhost-user",
        &[DIRECTORY, QEMU, MEMORY],
        &[PING, RESOLVERS, FILES],
    ),
    ("exec", &[GUESTS], &[PING, RESOLVERS, FILES]),
    ("status, list, forward, policy, down", &[DIRECTORY], &[]),
    ("bench", &[GUESTS, IP], &[TAPS, FILES]),
];

/// The commands whose verdict is the exit status.
const VITAL: [&str; 3] = ["up", "run", "exec"];

#[derive(Serialize)]
struct Finding {
    verdict: Verdict,
    what: &'static str,
    finding: String,
}

/// What the findings mean for a command.
#[derive(Serialize)]
struct Outlook {
    command: &'static str,
    verdict: Verdict,
    /// The findings that it is for.
    because: Vec<&'static str>,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    findings: Vec<Finding>,
    commands: Vec<Outlook>,
}

impl Report {
    fn new() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            findings: Vec::new(),
            commands: Vec::new(),
        }
    }

    fn add(&mut self, verdict: Verdict, what: &'static str, finding: impl Into<String>) {
        let finding = finding.into();
        self.findings.push(Finding {
            verdict,
            what,
            finding,
        });
    }

    /// Draws the conclusions for each command.
    fn conclude(&mut self) {
        let verdict_of = |what: &str| {
            let found = self.findings.iter().find(|finding| finding.what == what);
            found.map_or(Verdict::Good, |finding| finding.verdict)
        };
        let outlook =
            |&(command, needs, likes): &(&'static str, &[&'static str], &[&'static str])| {
                let liked = likes
                    .iter()
                    .map(|&what| (what, verdict_of(what).min(Verdict::Note)));
                let all = needs
                    .iter()
                    .map(|&what| (what, verdict_of(what)))
                    .chain(liked);
                let all: Vec<_> = all.collect();
                let verdict = all
                    .iter()
                    .map(|&(_, verdict)| verdict)
                    .max()
                    .unwrap_or(Verdict::Good);
                let causes = all
                    .iter()
                    .filter(|&&(_, of)| of == verdict && of != Verdict::Good);
                let because = causes.map(|&(what, _)| what).collect();
                Outlook {
                    command,
                    verdict,
                    because,
                }
            };
        self.commands = COMMANDS.iter().map(outlook).collect();
    }

    fn is_good(&self) -> bool {
        let vital = |outlook: &&Outlook| VITAL.contains(&outlook.command);
        let mut vital = self.commands.iter().filter(vital);
        vital.all(|outlook| outlook.verdict != Verdict::Bad)
    }

    fn render(&self) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            let (word, what) = (finding.verdict.word(), finding.what);
            let _ = writeln!(text, "{word:<5} {what:<17} {}", finding.finding);
        }
        text.push_str("\nWhat that means:\n");
        for outlook in &self.commands {
            let (word, command) = (outlook.verdict.word(), outlook.command);
            let because = match outlook.because.join(", ") {
                causes if causes.is_empty() => String::new(),
                causes => format!("see {causes}"),
            };
            let line = format!("{word:<5} {command:<36} {because}");
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }
}

pub(super) fn check(args: &Args) -> Result<ExitCode, Failure> {
    let mut report = Report::new();
    vmm_taps(&mut report);
    namespace_guests(&mut report);
    runtime_directory(&mut report);
    ping_sockets(&mut report);
    resolvers(&mut report);
    open_files(&mut report);
    programs(&mut report);
    guests_memory(&mut report);
    report.conclude();
    match args.json {
        true => {
            let text = serde_json::to_string_pretty(&report).map_err(std::io::Error::from)?;
            print(&format!("{text}\n"))?;
        }
        false => print(&report.render())?,
    }
    Ok(if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Warns of what `run`, `qemu` and `exec` will find missing on a network that starts.
pub(super) fn warn_of_guests() {
    if let Err(error) = make_wire() {
        log::warn!(
            "'run', 'qemu' and 'exec' can't attach guests here, only vhost-user ports will work: {error}"
        );
    }
}

/// Makes a VMM's tap, the whole way.
fn make_wire() -> Result<WireKind, TapError> {
    let (helper, _events) = Helper::spawn(None)?;
    helper
        .create_wire(WireOptions::default())
        .map(|wire| wire.kind)
}

fn vmm_taps(report: &mut Report) {
    match make_wire() {
        Ok(WireKind::Mirred) => report.add(Verdict::Good, TAPS, "joined by tc mirred"),
        Ok(WireKind::Packet) => report.add(
            Verdict::Note,
            TAPS,
            "by packet socket, which is slower: the kernel lacks act_mirred (as root, \
             'modprobe act_mirred cls_matchall')",
        ),
        Err(error) => report.add(Verdict::Bad, TAPS, error.to_string()),
    }
}

fn namespace_guests(report: &mut Report) {
    let wanted = Wanted {
        command: &["true".into()],
        queues: 1,
        no_offload: false,
        root: false,
    };
    match NewGuest::spawn(&wanted) {
        Ok(_) => report.add(Verdict::Good, GUESTS, "user and network namespaces work"),
        Err(Failure::Runtime(error)) => {
            report.add(Verdict::Bad, GUESTS, error.to_string());
        }
        Err(_) => report.add(Verdict::Bad, GUESTS, "failed"),
    }
}

fn runtime_directory(report: &mut Report) {
    let dir = RuntimeDir::from_env();
    // A name of this process's own, so that no running network is disturbed.
    match dir.claim(&format!("check-{}", std::process::id())) {
        Ok(claim) => {
            claim.forget();
            report.add(Verdict::Good, DIRECTORY, dir.path().display().to_string());
        }
        Err(error) => {
            report.add(Verdict::Bad, DIRECTORY, error.to_string());
        }
    }
}

fn ping_sockets(report: &mut Report) {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP));
    match socket {
        Ok(_) => report.add(Verdict::Good, PING, "ping sockets are allowed"),
        Err(error) => report.add(
            Verdict::Note,
            PING,
            format!(
                "guests can't ping beyond the gateway ({error}): as root, \
                 'sysctl -w net.ipv4.ping_group_range=\"0 2147483647\"'"
            ),
        ),
    }
}

fn resolvers(report: &mut Report) {
    let text = small_file::read_text(Path::new("/etc/resolv.conf"), RESOLV_CONF_LEN_MAX)
        .unwrap_or_default();
    let servers = nameservers(&text);
    match servers.is_empty() {
        true => report.add(
            Verdict::Note,
            RESOLVERS,
            "none in /etc/resolv.conf: guests resolve names only with --dns ADDR",
        ),
        false => report.add(Verdict::Good, RESOLVERS, servers.join(", ")),
    }
}

fn nameservers(text: &str) -> Vec<String> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let is_server = words.next() == Some("nameserver");
        let address = words.next().filter(|_| is_server)?;
        // A scope (fe80::1%eth0) is no part of the address.
        let bare = address.split('%').next().unwrap_or(address);
        bare.parse::<IpAddr>().ok().map(|_| address.to_owned())
    };
    text.lines().filter_map(address).collect()
}

fn open_files(report: &mut Report) {
    let flows_max = NetworkConfig::default().flows_max;
    let wanted = open_files_wanted(flows_max, &[]);
    match getrlimit(Resource::Nofile).maximum {
        Some(maximum) if maximum < wanted as u64 => report.add(
            Verdict::Note,
            FILES,
            format!(
                "{maximum} at most, and each connection of a guest takes one: a full network of \
                 {flows_max} needs {wanted}; raise the hard limit ('ulimit -Hn', LimitNOFILE=)"
            ),
        ),
        Some(maximum) => report.add(Verdict::Good, FILES, format!("{maximum} at most")),
        None => report.add(Verdict::Good, FILES, "unlimited"),
    }
}

/// Programs of others that commands need.
fn programs(report: &mut Report) {
    match qemu::find() {
        Ok(path) => report.add(Verdict::Good, QEMU, path.display().to_string()),
        Err(Failure::Runtime(error)) => report.add(Verdict::Bad, QEMU, error.to_string()),
        Err(_) => {}
    }
    match bench::find("ip") {
        Some(path) => report.add(Verdict::Good, IP, path.display().to_string()),
        None => {
            let remedy = "no 'ip' in PATH: install Debian's package iproute2";
            report.add(Verdict::Bad, IP, remedy);
        }
    }
}

/// What guests' memory is guarded by, but for that on hugetlbfs.
fn guests_memory(report: &mut Report) {
    match userfault::prepare() {
        Ok(()) => report.add(Verdict::Good, MEMORY, "userfaultfd is allowed"),
        Err(error) => report.add(
            Verdict::Bad,
            MEMORY,
            format!(
                "no userfaultfd ({error}): memory on hugetlbfs alone is taken; allow that system call (a container's \
                 seccomp profile may not)"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameservers_of_a_resolver_file() {
        let text = "# x\nnameserver 9.9.9.9\n nameserver fe80::1%eth0 \nsearch a\nnameserver x\nnameservers 1.1.1.1";
        assert_eq!(nameservers(text), ["9.9.9.9", "fe80::1%eth0"]);
    }

    #[test]
    fn each_command_has_its_verdict() {
        let conclude = |findings: &[(Verdict, &'static str)]| {
            let mut report = Report::new();
            for &(verdict, what) in findings {
                report.add(verdict, what, "b");
            }
            report.conclude();
            report
        };
        let report = conclude(&[(Verdict::Note, PING)]);
        assert!(report.is_good() && report.commands[0].verdict == Verdict::Note);
        // A wire by packet socket is slower; without QEMU only 'qemu' fails.
        let report = conclude(&[(Verdict::Note, TAPS), (Verdict::Bad, QEMU)]);
        assert!(report.is_good());
        let text = report.render();
        assert!(text.contains("FAIL  QEMU              b\n"), "{text}");
        assert!(
            text.contains("\nok    up\nnote  run                                  see taps"),
            "{text}"
        );
        assert!(
            text.contains("\nFAIL  qemu                                 see QEMU\n"),
            "{text}"
        );
        let report = conclude(&[(Verdict::Bad, TAPS)]);
        assert!(!report.is_good(), "'run' is vital");
        assert!(
            report
                .commands
                .iter()
                .any(|outlook| outlook.command == "exec" && outlook.verdict == Verdict::Good)
        );
        // What a command only likes to have does not fail it.
        assert!(
            report
                .commands
                .iter()
                .any(|outlook| outlook.command == "bench" && outlook.verdict == Verdict::Note)
        );
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["commands"][1]["because"][0], TAPS);
    }

    #[test]
    fn every_need_is_looked_at() {
        let all = [
            TAPS, GUESTS, DIRECTORY, PING, RESOLVERS, FILES, QEMU, IP, MEMORY,
        ];
        for (command, needs, likes) in COMMANDS {
            let words = needs.iter().chain(likes);
            assert!(
                words.into_iter().all(|what| all.contains(what)),
                "{command}"
            );
        }
        assert!(
            VITAL
                .iter()
                .all(|vital| COMMANDS.iter().any(|(command, ..)| command == vital))
        );
    }
}
