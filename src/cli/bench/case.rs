//! What is measured: the cases, which way each goes, and the figures that each gives.

use serde::{Deserialize, Serialize};

/// A part of the report: from where to where data goes, or what the network itself takes. Connections
/// are opened by the (first) guest, as that is what a NAT is there for; those to a published port by the
/// outside.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, clap::ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Section {
    /// From a guest to another on the same network
    GuestToGuest,
    /// From a guest to the outside
    GuestToOutside,
    /// From the outside to a guest that has connected to it
    OutsideToGuest,
    /// From the outside to a guest, by a connection to a port of the host
    OutsideToPublished,
    /// The way back of such a connection
    PublishedToOutside,
    /// From a QEMU guest to the outside; takes --guest-image
    VmToOutside,
    /// From the outside to a QEMU guest that has connected to it; takes --guest-image
    OutsideToVm,
    /// From a QEMU guest to another on the same network; takes --guest-image
    VmToVm,
    /// Memory and processor time that lanlet itself takes
    Costs,
}

impl Section {
    pub(super) const ALL: [Section; 9] = [
        Section::GuestToGuest,
        Section::GuestToOutside,
        Section::OutsideToGuest,
        Section::OutsideToPublished,
        Section::PublishedToOutside,
        Section::VmToOutside,
        Section::OutsideToVm,
        Section::VmToVm,
        Section::Costs,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Section::GuestToGuest => "guest to guest",
            Section::GuestToOutside => "guest to outside",
            Section::OutsideToGuest => "outside to guest",
            Section::OutsideToPublished => "outside to published port",
            Section::PublishedToOutside => "published port to outside",
            Section::VmToOutside => "VM to outside",
            Section::OutsideToVm => "outside to VM",
            Section::VmToVm => "VM to VM",
            Section::Costs => "memory and idle time",
        }
    }

    /// Where the guests of its ways are ([`super::way::Ends`]); `None`: it has none.
    pub(super) fn guests(self) -> Option<Guests> {
        match self {
            Section::VmToOutside | Section::OutsideToVm => Some(Guests::Vms),
            Section::VmToVm => Some(Guests::VmPairs),
            Section::Costs => None,
            _ => Some(Guests::Namespaces),
        }
    }

    /// Whether both ends are guests.
    pub(super) fn is_inside(self) -> bool {
        matches!(self, Section::GuestToGuest | Section::VmToVm)
    }

    /// Whether the outside opens the connections, and the guest serves.
    pub(super) fn is_published(self) -> bool {
        matches!(
            self,
            Section::OutsideToPublished | Section::PublishedToOutside
        )
    }

    /// Whether data goes to whoever has opened the connection.
    pub(super) fn is_way_back(self) -> bool {
        matches!(
            self,
            Section::OutsideToGuest | Section::PublishedToOutside | Section::OutsideToVm
        )
    }
}

/// What guests are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Guests {
    /// Network namespaces.
    Namespaces,
    /// QEMU's, booted from the image that --guest-image names.
    Vms,
    /// Two of these on a network.
    VmPairs,
}

impl Guests {
    pub(super) const ALL: [Guests; 3] = [Guests::Namespaces, Guests::Vms, Guests::VmPairs];
}

/// What the load generators do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Load {
    /// Streams that send as fast as they can.
    Tcp { streams: usize },
    /// A stream each between two pairs of guests.
    Pairs,
    /// Datagrams as fast as they can be sent; `trains`: with UDP_SEGMENT, received with UDP_GRO.
    Udp {
        bytes: u16,
        flows: usize,
        trains: bool,
    },
    /// Requests and responses of 64 bytes over so many connections in turn, one at a time.
    RoundTrips { flows: usize },
    /// Connections that are opened, closed by the server, and closed.
    Connects,
    /// Nothing is sent for its speed: what the network's processes take is looked at.
    Cost(Cost),
}

/// What a network's memory and processor time are looked at for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Cost {
    /// Being there, with two guests that say nothing.
    Rest,
    /// A VMM's port.
    Port,
    /// An address leased by DHCP.
    Lease,
    /// A TCP connection through the NAT that was used and idles.
    TcpFlow,
    /// A UDP mapping of the NAT.
    UdpMapping,
    /// Eight TCP streams up, then down, then nothing.
    Burst,
}

/// A figure of a case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Metric {
    /// Empty where a case has only one.
    pub(super) name: &'static str,
    pub(super) unit: &'static str,
    pub(super) more_is_better: bool,
}

const RATE: Metric = Metric {
    name: "",
    unit: "Gbit/s",
    more_is_better: true,
};
const PACKETS: Metric = Metric {
    unit: "kpps",
    ..RATE
};
const CONNECTS: Metric = Metric {
    unit: "1/s",
    ..RATE
};
const fn less(name: &'static str, unit: &'static str) -> Metric {
    Metric {
        name,
        unit,
        more_is_better: false,
    }
}
const fn resident(name: &'static str) -> Metric {
    less(name, "MiB")
}
/// Resident memory of all processes of a network, divided by the number of what was added.
const EACH: Metric = less("", "KiB");
const P50: Metric = less("p50", "µs");
const P99: Metric = less("p99", "µs");
const P999: Metric = less("p99.9", "µs");
const CPU: Metric = less("CPU", "µs");

/// Largest payload whose rate is told in packets: beyond, bytes matter more.
const SMALL_BYTES_MAX: u16 = 64;

impl Load {
    /// The figures, in the order of [`Measured::values`].
    pub(super) fn metrics(self) -> &'static [Metric] {
        match self {
            Load::Tcp { .. } | Load::Pairs => &[RATE],
            Load::Udp { bytes, .. } if bytes <= SMALL_BYTES_MAX => &[PACKETS],
            Load::Udp { .. } => &[RATE],
            Load::RoundTrips { flows: 1 } => &[P50, P99, P999],
            Load::RoundTrips { .. } => &[P50, CPU],
            Load::Connects => &[CONNECTS],
            Load::Cost(Cost::Rest) => {
                const {
                    &[
                        resident("resident"),
                        resident("of it private"),
                        resident("helper, private"),
                        less("CPU of one core", "%"),
                    ]
                }
            }
            Load::Cost(Cost::Burst) => {
                const { &[resident("before"), resident("highest"), resident("after")] }
            }
            Load::Cost(_) => &[EACH],
        }
    }

    /// Whether it is part of a section: what the guest asks for and waits for is the same from either
    /// end.
    pub(super) fn goes(self, section: Section) -> bool {
        let is_cost = matches!(self, Load::Cost(_));
        if is_cost || section == Section::Costs {
            return is_cost && section == Section::Costs;
        }
        if self == Load::Pairs {
            return section == Section::GuestToGuest;
        }
        let goes_back = matches!(self, Load::Tcp { .. } | Load::Udp { .. });
        // Ports are forwarded, and VMs emulated, at a cost per connection and byte; what datagrams and
        // many flows cost the rest shows. But between VMs datagrams are what no offload helps.
        let is_basic = match self {
            Load::Tcp { .. } | Load::Connects | Load::RoundTrips { flows: 1 } => true,
            Load::Udp { .. } => section == Section::VmToVm,
            Load::RoundTrips { .. } | Load::Pairs | Load::Cost(_) => false,
        };
        let is_plain = section.guests() == Some(Guests::Namespaces) && !section.is_published();
        (is_basic || is_plain) && (goes_back || !section.is_way_back())
    }
}

/// What a load generator counted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// Time counted in.
    pub(super) secs: f64,
    pub(super) bytes: u64,
    /// Datagrams, round trips or connections.
    pub(super) units: u64,
    /// Percentiles of the round trip time ([`super::statistics::PERCENTILES`]), microseconds.
    pub(super) round_trip_us: [f64; 3],
    /// Time that the machine's processors worked, all of them together; 0 where it was not looked at.
    pub(super) busy_secs: f64,
}

impl Measured {
    /// The figures of a case.
    pub(super) fn values(&self, load: Load) -> Vec<f64> {
        let per_second = |count: u64| count as f64 / self.secs;
        match load {
            Load::Udp { bytes, .. } if bytes <= SMALL_BYTES_MAX => {
                vec![per_second(self.units) / 1e3]
            }
            Load::Tcp { .. } | Load::Pairs | Load::Udp { .. } => {
                vec![per_second(self.bytes) * 8.0 / 1e9]
            }
            Load::RoundTrips { flows: 1 } => self.round_trip_us.to_vec(),
            Load::RoundTrips { .. } => vec![
                self.round_trip_us[0],
                self.busy_secs * 1e6 / self.units.max(1) as f64,
            ],
            Load::Connects => vec![per_second(self.units)],
            // Nobody counts it: it is looked up (super::costs).
            Load::Cost(_) => Vec::new(),
        }
    }
}

/// One thing to measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Case {
    pub(super) name: &'static str,
    /// What `--cases` takes for it and its like.
    pub(super) group: &'static str,
    /// In the words of a report.
    pub(super) title: &'static str,
    pub(super) load: Load,
}

const fn case(name: &'static str, group: &'static str, title: &'static str, load: Load) -> Case {
    Case {
        name,
        group,
        title,
        load,
    }
}

const fn cost(name: &'static str, title: &'static str, cost: Cost) -> Case {
    case(name, "costs", title, Load::Cost(cost))
}

const fn udp(bytes: u16, flows: usize, trains: bool) -> Load {
    Load::Udp {
        bytes,
        flows,
        trains,
    }
}

/// All cases. A datagram of 1,448 bytes fits an MTU of 1,500 under IPv4 and IPv6 headers.
pub(super) const CASES: [Case; 20] = [
    case("tcp-1", "tcp", "TCP, 1 stream", Load::Tcp { streams: 1 }),
    case("tcp-8", "tcp", "TCP, 8 streams", Load::Tcp { streams: 8 }),
    case("tcp-pairs", "tcp", "TCP, 2 pairs of guests", Load::Pairs),
    case("udp-64", "udp", "UDP, 64 bytes", udp(64, 1, false)),
    case(
        "udp-64-flows",
        "udp",
        "UDP, 64 bytes, 100 flows",
        udp(64, 100, false),
    ),
    case("udp-512", "udp", "UDP, 512 bytes", udp(512, 1, false)),
    case("udp-1448", "udp", "UDP, 1448 bytes", udp(1448, 1, false)),
    case(
        "udp-gso",
        "udp",
        "UDP, trains of 1448 bytes (GSO)",
        udp(1448, 1, true),
    ),
    case(
        "rtt",
        "rtt",
        "TCP request/response",
        Load::RoundTrips { flows: 1 },
    ),
    case("connect", "connect", "TCP connect + close", Load::Connects),
    case(
        "flows-10",
        "flows",
        "round trip, 10 flows",
        Load::RoundTrips { flows: 10 },
    ),
    case(
        "flows-100",
        "flows",
        "round trip, 100 flows",
        Load::RoundTrips { flows: 100 },
    ),
    case(
        "flows-1k",
        "flows",
        "round trip, 1,000 flows",
        Load::RoundTrips { flows: 1_000 },
    ),
    case(
        "flows-10k",
        "flows",
        "round trip, 10,000 flows",
        Load::RoundTrips { flows: 10_000 },
    ),
    cost("rest", "a network with two idle guests", Cost::Rest),
    cost("per-port", "a VMM's port", Cost::Port),
    cost("per-lease", "a DHCP lease", Cost::Lease),
    cost("per-flow", "an idle TCP flow", Cost::TcpFlow),
    cost("per-mapping", "a UDP mapping", Cost::UdpMapping),
    cost("burst", "TCP, 8 streams, resident", Cost::Burst),
];

/// The words that `--cases` takes: groups, then single cases.
pub(super) fn words() -> Vec<&'static str> {
    let mut words: Vec<_> = CASES.iter().map(|case| case.group).collect();
    words.dedup();
    let singles = CASES.iter().map(|case| case.name);
    words.extend(singles.filter(|name| CASES.iter().all(|case| case.group != *name)));
    words
}

/// The cases that these words are for; all where there is none.
pub(super) fn select(words: &[String]) -> Vec<Case> {
    let is_meant = |case: &Case| {
        words.is_empty()
            || words
                .iter()
                .any(|word| word == case.name || word == case.group)
    };
    CASES.into_iter().filter(is_meant).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_selects_and_every_case_can_be_selected() {
        let words = words();
        assert!(words.contains(&"tcp") && words.contains(&"tcp-8"));
        let mut unique = words.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), words.len(), "{words:?}");
        for word in &words {
            assert!(!select(&[(*word).to_owned()]).is_empty(), "{word}");
        }
        assert_eq!(select(&[]).len(), CASES.len());
        let two = select(&["rtt".to_owned(), "udp-64".to_owned()]);
        let names: Vec<_> = two.iter().map(|case| case.name).collect();
        assert_eq!(names, ["udp-64", "rtt"]);
    }

    #[test]
    fn a_case_gives_as_many_figures_as_it_has_metrics() {
        let measured = Measured {
            secs: 2.0,
            bytes: 1_000_000_000,
            units: 4_000,
            round_trip_us: [50.0, 90.0, 200.0],
            busy_secs: 1.0,
        };
        let is_cost = |case: &Case| matches!(case.load, Load::Cost(_));
        for case in CASES.into_iter().filter(|case| !is_cost(case)) {
            let values = measured.values(case.load);
            assert_eq!(values.len(), case.load.metrics().len(), "{}", case.name);
        }
        assert_eq!(measured.values(Load::Tcp { streams: 1 }), [4.0]);
        assert_eq!(measured.values(udp(64, 1, false)), [2.0]);
        assert_eq!(measured.values(Load::Connects), [2_000.0]);
        assert_eq!(
            measured.values(Load::RoundTrips { flows: 10 }),
            [50.0, 250.0]
        );
    }

    #[test]
    fn only_what_flows_has_a_way_back() {
        let down = |load: Load| load.goes(Section::OutsideToGuest);
        assert!(down(Load::Tcp { streams: 1 }));
        assert!(!down(Load::Connects) && !down(Load::RoundTrips { flows: 1 }));
        assert!(udp(64, 1, false).goes(Section::VmToVm));
        assert!(!udp(64, 1, false).goes(Section::VmToOutside));
        assert!(!Load::Pairs.goes(Section::VmToVm));
        for case in CASES {
            let is_cost = matches!(case.load, Load::Cost(_));
            assert_eq!(case.load.goes(Section::Costs), is_cost, "{}", case.name);
        }
    }
}
