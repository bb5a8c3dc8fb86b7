//! The demo's steps, inside the world.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use super::super::{Failure, child, print};
use super::guest::Guest;
use super::progress::Progress;
use super::{FILE_BYTES, FILE_NAME};
use crate::config::{NAME_DEFAULT, Settings};
use crate::network::{Network, PortOptions, Status};
use crate::stats::DropReason;

/// The world's server outside (lab/world).
const OUTSIDE: &str = "198.51.100.2";
/// A guest without KVM is up in 3 s on an idle machine.
const BOOT_TIME_MAX: Duration = Duration::from_secs(90);
/// A ping, a download or a measurement: 3 s each where nothing is wrong.
const STEP_TIME_MAX: Duration = Duration::from_secs(60);

/// Flows of the two guests: far more than they open.
const FLOWS_MAX: usize = 1024;
/// What every network drops some of: frames for nobody. The kernel of a guest looks for IPv6 routers
/// and sends the last segments of connections that are over.
const HARMLESS: [DropReason; 3] = [
    DropReason::Unclaimed,
    DropReason::NoPort,
    DropReason::NoFlow,
];

/// The two guests.
const NAMES: [&str; 2] = ["alice", "bob"];

/// What a step found, or why it failed.
type Step = Result<String, String>;

type StepFn<'a> = fn(&mut Demo<'a>) -> Step;

struct Demo<'a> {
    network: Network,
    guests: Vec<Guest>,
    addresses: Vec<String>,
    router: String,
    progress: Progress,
    lab: &'a Path,
    accel: &'a str,
    files: &'a Path,
}

/// Runs all steps. A failed one is shown with the guests' consoles, and ends the demo.
pub(super) fn run(lab: &Path, accel: &str, files: &Path) -> Result<ExitCode, Failure> {
    let mut progress = Progress::new();
    progress.begin("network");
    let settings = Settings {
        flows_max: Some(FLOWS_MAX),
        ..Settings::default()
    };
    let config = settings.resolve(NAME_DEFAULT)?;
    child::raise_open_files();
    let finding = format!("{}, gateway {}", config.subnet(), config.gateway);
    let network = Network::start(config)?;
    progress.done(&finding);
    let mut demo = Demo {
        network,
        guests: Vec::new(),
        addresses: Vec::new(),
        router: String::new(),
        progress,
        lab,
        accel,
        files,
    };
    let steps: [(&'static str, StepFn<'_>); 7] = [
        ("boot", Demo::boot),
        ("DHCP", Demo::leases),
        ("ping guest to guest", Demo::ping),
        ("file from outside by NAT", Demo::fetch),
        ("TCP guest to guest", Demo::measure_guests),
        ("TCP guest to outside", Demo::measure_outside),
        ("drops", Demo::drops),
    ];
    for (name, step) in steps {
        demo.progress.begin(name);
        match step(&mut demo) {
            Ok(finding) => demo.progress.done(&finding),
            Err(reason) => {
                demo.progress.failed(&reason);
                let consoles: String = demo.guests.iter_mut().map(Guest::console).collect();
                print(&format!("The guests' last words:\n{consoles}"))?;
                return Err(Failure::Reported);
            }
        }
    }
    for guest in &mut demo.guests {
        guest.end();
    }
    let secs = demo.progress.total().as_secs_f32();
    print(&format!(
        "\nAll of it worked, in {secs:.0} s. Yours next: lanlet qemu -- -m 1G disk.img\n"
    ))?;
    Ok(ExitCode::SUCCESS)
}

impl Demo<'_> {
    fn boot(&mut self) -> Step {
        for name in NAMES {
            let options = PortOptions {
                name: name.parse().ok(),
                ..PortOptions::default()
            };
            let port = self
                .network
                .attach_vmm(options)
                .map_err(|error| error.to_string())?;
            let guest = Guest::boot(name, self.lab, self.accel, self.files, port).map_err(say)?;
            self.guests.push(guest);
        }
        self.each(|guest, progress| {
            let marks = guest.wait_for("boot", BOOT_TIME_MAX, progress)?;
            Ok(format!(
                "{} after {} s",
                guest.name,
                marks.get("boot").unwrap_or("?")
            ))
        })
    }

    fn leases(&mut self) -> Step {
        let mut leases = Vec::new();
        let finding = self.each(|guest, progress| {
            let marks = guest.wait_for("lease", BOOT_TIME_MAX, progress)?;
            let lease = marks
                .get("lease")
                .filter(|&lease| lease != "none")
                .ok_or("got no lease")?;
            let address = lease.split('/').next().unwrap_or(lease).to_owned();
            leases.push((address, marks.get("router").unwrap_or_default().to_owned()));
            let finding = format!("{} has {lease}", guest.name);
            guest.wait_for("up", BOOT_TIME_MAX, progress)?;
            Ok(finding)
        })?;
        if leases[0].0 == leases[1].0 {
            return Err(format!("both guests have {}", leases[0].0));
        }
        self.router = leases[0].1.clone();
        self.addresses = leases.into_iter().map(|(address, _)| address).collect();
        Ok(finding)
    }

    fn ping(&mut self) -> Step {
        let addresses = self.addresses.clone();
        let to_peer = self.ask_each(|index| format!("ping {}", addresses[1 - index]))?;
        let router = self.router.clone();
        let to_gateway = self.ask_each(|_| format!("ping {router}"))?;
        Ok(format!(
            "alice to bob {} ms, bob to alice {} ms, to the gateway {} and {} ms",
            to_peer[0], to_peer[1], to_gateway[0], to_gateway[1]
        ))
    }

    fn fetch(&mut self) -> Step {
        let expected = sha256(&self.files.join(FILE_NAME))?;
        let sums = self.ask_each(|_| format!("fetch {OUTSIDE} /{FILE_NAME} {FILE_BYTES}"))?;
        for (name, sum) in NAMES.iter().zip(&sums) {
            if *sum != expected {
                return Err(format!("{name} got SHA-256 {sum}, the file has {expected}"));
            }
        }
        let mib = FILE_BYTES >> 20;
        Ok(format!(
            "{mib} MiB each, SHA-256 {}... equal in both guests",
            &expected[..8]
        ))
    }

    fn measure_guests(&mut self) -> Step {
        let bob = self.addresses[1].clone();
        self.ask(1, "serve")?;
        let there = self.ask(0, &format!("measure {bob}"))?;
        self.ask(1, "serve")?;
        let back = self.ask(0, &format!("measure {bob} -R"))?;
        Ok(format!(
            "alice to bob {}, bob to alice {}",
            gigabits(&there),
            gigabits(&back)
        ))
    }

    fn measure_outside(&mut self) -> Step {
        let up = self.ask(0, &format!("measure {OUTSIDE}"))?;
        let down = self.ask(0, &format!("measure {OUTSIDE} -R"))?;
        Ok(format!("up {}, down {}", gigabits(&up), gigabits(&down)))
    }

    fn drops(&mut self) -> Step {
        drops(&self.network.status())
    }

    /// Does something with each guest in turn; the findings, joined.
    fn each(&mut self, mut step: impl FnMut(&mut Guest, &mut Progress) -> Step) -> Step {
        let mut findings = Vec::new();
        for guest in &mut self.guests {
            let finding = step(guest, &mut self.progress);
            findings.push(finding.map_err(|reason| format!("{}: {reason}", guest.name))?);
        }
        Ok(findings.join(", "))
    }

    /// Has both guests do something at the same time; their answers.
    fn ask_each(&mut self, command: impl Fn(usize) -> String) -> Result<Vec<String>, String> {
        for (index, guest) in self.guests.iter_mut().enumerate() {
            let told = guest.tell(&command(index));
            told.map_err(|reason| format!("{}: {reason}", guest.name))?;
        }
        (0..self.guests.len())
            .map(|index| self.answer(index))
            .collect()
    }

    fn ask(&mut self, index: usize, command: &str) -> Step {
        let guest = &mut self.guests[index];
        guest
            .tell(command)
            .map_err(|reason| format!("{}: {reason}", guest.name))?;
        self.answer(index)
    }

    fn answer(&mut self, index: usize) -> Step {
        let guest = &mut self.guests[index];
        let answer = guest.answer(STEP_TIME_MAX, &mut self.progress);
        answer.map_err(|reason| format!("{}: {reason}", guest.name))
    }
}

fn say(failure: Failure) -> String {
    match failure {
        Failure::Runtime(error) => error.to_string(),
        Failure::Usage(message) => message,
        Failure::Reported => "failed".to_owned(),
    }
}

/// A file's checksum by the system's own tool: a second opinion, not this program's.
fn sha256(path: &Path) -> Result<String, String> {
    let output = Command::new("sha256sum").arg("-b").arg(path).output();
    let output = output.map_err(|error| format!("sha256sum: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let sum = text.split_whitespace().next().filter(|sum| sum.len() == 64);
    Ok(sum.ok_or("sha256sum failed")?.to_owned())
}

/// What iperf3 counts in Mbit/s, in Gbit/s.
fn gigabits(megabits: &str) -> String {
    match megabits.parse::<f64>() {
        Ok(value) => format!("{:.2} Gbit/s", value / 1000.0),
        Err(_) => megabits.to_owned(),
    }
}

/// All drops of all ports, by reason. An error unless all of them are harmless.
fn drops(status: &Status) -> Step {
    if let Some(why) = &status.incomplete {
        return Err(why.clone());
    }
    let mut sums = std::collections::BTreeMap::new();
    for (reason, count) in status.ports.iter().flat_map(|port| &port.drops) {
        *sums.entry(reason).or_insert(0) += count;
    }
    let frames: u64 = status.ports.iter().map(|port| port.rx_frames).sum();
    let words: Vec<String> = sums
        .iter()
        .filter(|&(_, &count)| count != 0)
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    if words.is_empty() {
        return Ok(format!("none of {frames} frames"));
    }
    let finding = format!("{}, of {frames} frames", words.join(", "));
    let is_harmless = |name: &str| HARMLESS.iter().any(|reason| reason.name() == name);
    match sums
        .iter()
        .all(|(name, &count)| count == 0 || is_harmless(name))
    {
        true => Ok(finding),
        false => Err(finding),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::PortStatus;

    #[test]
    fn a_drop_that_nobody_expects_fails_the_demo() {
        let with = |drops: &[(&str, u64)]| {
            let drops = drops.iter().map(|&(name, count)| (name.to_owned(), count));
            let port = PortStatus {
                rx_frames: 9,
                drops: drops.collect(),
                ..PortStatus::default()
            };
            drops_of(vec![port])
        };
        let drops_of_none = with(&[("egress_full", 0)]);
        assert_eq!(drops_of_none.unwrap(), "none of 9 frames");
        let harmless = with(&[("no_flow", 2), ("no_port", 1), ("unclaimed", 3)]);
        assert_eq!(
            harmless.unwrap(),
            "no_flow 2, no_port 1, unclaimed 3, of 9 frames"
        );
        for bad in ["egress_full", "kernel_tx_dropped", "malformed"] {
            let finding = with(&[("no_flow", 2), (bad, 1)]).unwrap_err();
            assert!(finding.contains(&format!("{bad} 1")), "{finding}");
        }
    }

    fn drops_of(ports: Vec<PortStatus>) -> Step {
        drops(&Status {
            ports,
            ..Status::default()
        })
    }
}
