//! Who is behind the ports: what ports, leases, learned MACs and heard addresses say together.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::status::PortStatus;
use crate::dhcp::lease::LeaseView;
use crate::frame::{Mac, PortId, Station};
use crate::wire::ipv6::is_link_local;

/// Guests shown of one port: a VM that is a bridge has one for each machine behind it.
const SHOWN_MAX: usize = 16;

/// One guest: a MAC behind a port, or a port that nobody was heard on yet.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Name of its port.
    pub name: String,
    /// Number of its port.
    pub port: u16,
    /// Kind of its port.
    pub kind: String,
    /// Its MAC, if that is known.
    pub mac: Option<String>,
    /// The name it gave itself by DHCP.
    pub hostname: Option<String>,
    /// Its IPv4 addresses, the leased one first.
    pub ipv4: Vec<Ipv4Addr>,
    /// Its IPv6 addresses, link-local ones left out, the one heard last first.
    pub ipv6: Vec<Ipv6Addr>,
    /// Bytes that went to its port.
    pub received_bytes: u64,
    /// Bytes that came from its port.
    pub sent_bytes: u64,
    /// Frames to and from its port that were dropped, for whatever reason.
    pub drops: u64,
    /// Seconds since its port was attached.
    pub attached_secs: u64,
}

/// What is known of the guests, piece by piece.
pub(super) struct Pieces<'a> {
    /// The ports.
    pub(super) ports: &'a [PortStatus],
    /// MACs that lanlet gave to the guests of ports.
    pub(super) given: &'a [Station],
    /// IPv6 addresses that it gave.
    pub(super) given6: &'a [(Mac, Ipv6Addr)],
    /// The learned MACs.
    pub(super) learned: &'a [Station],
    /// The leases that are held.
    pub(super) leases: &'a [LeaseView],
    /// The addresses that were heard, the last one last.
    pub(super) heard: &'a [(IpAddr, Station)],
}

impl GuestStatus {
    /// Whether an address of it is known.
    pub fn has_address(&self) -> bool {
        !self.ipv4.is_empty() || !self.ipv6.is_empty()
    }
}

impl Pieces<'_> {
    /// The port of each MAC: where it was learned, else whose it is.
    pub(super) fn ports_of_macs(&self) -> HashMap<Mac, PortId> {
        let stations = self.given.iter().chain(self.learned);
        stations
            .map(|station| (station.mac, station.port))
            .collect()
    }

    /// The guests, by port; of one port the MAC that lanlet gave comes first.
    pub(super) fn guests(&self) -> Vec<GuestStatus> {
        let mut macs: BTreeMap<PortId, Vec<Mac>> = BTreeMap::new();
        let leases = self.leases.iter();
        let leased: HashMap<(Mac, Option<PortId>), &LeaseView> = leases
            .map(|lease| ((lease.mac, lease.port), lease))
            .collect();
        let lease_of = |station: &Station| {
            let on_port = leased.get(&(station.mac, Some(station.port)));
            // One of an earlier port, or of an earlier run.
            on_port
                .or_else(|| leased.get(&(station.mac, None)))
                .copied()
        };
        let heard: HashSet<PortId> = self.learned.iter().map(|station| station.port).collect();
        let learned: HashSet<&Station> = self.learned.iter().collect();
        for station in self.given {
            // A VMM need not have taken the MAC that was made for it.
            if learned.contains(station)
                || lease_of(station).is_some()
                || !heard.contains(&station.port)
            {
                macs.entry(station.port).or_default().push(station.mac);
            }
        }
        for station in self.learned {
            let of_port = macs.entry(station.port).or_default();
            if !of_port.contains(&station.mac) && of_port.len() < SHOWN_MAX {
                of_port.push(station.mac);
            }
        }
        let mut addresses: HashMap<Station, (Vec<Ipv4Addr>, Vec<Ipv6Addr>)> = HashMap::new();
        for &(address, station) in self.heard.iter().rev() {
            let (v4, v6) = addresses.entry(station).or_default();
            match address {
                IpAddr::V4(address) => v4.push(address),
                IpAddr::V6(address) if is_link_local(address) => {}
                IpAddr::V6(address) => v6.push(address),
            }
        }
        let mut guests = Vec::new();
        for port in self
            .ports
            .iter()
            .filter(|port| port.id != PortId::GATEWAY.0)
        {
            let id = PortId(port.id);
            let of_port = macs.get(&id).map_or(&[][..], Vec::as_slice);
            let blank = GuestStatus {
                name: port.name.clone(),
                port: port.id,
                kind: port.kind.clone(),
                received_bytes: port.tx_bytes,
                sent_bytes: port.rx_bytes,
                drops: port.drops.values().sum(),
                attached_secs: port.attached_secs,
                ..GuestStatus::default()
            };
            if of_port.is_empty() {
                guests.push(blank.clone());
            }
            for &mac in of_port {
                let station = Station { mac, port: id };
                let lease = lease_of(&station);
                let (mut ipv4, mut ipv6) = addresses.remove(&station).unwrap_or_default();
                if let Some(lease) = lease {
                    ipv4.retain(|&address| address != lease.address);
                    ipv4.insert(0, lease.address);
                }
                for &(_, address) in self.given6.iter().filter(|(of, _)| *of == mac) {
                    if !ipv6.contains(&address) {
                        ipv6.push(address);
                    }
                }
                guests.push(GuestStatus {
                    mac: Some(mac.to_string()),
                    hostname: lease
                        .and_then(|lease| lease.hostname.as_ref())
                        .map(ToString::to_string),
                    ipv4,
                    ipv6,
                    ..blank.clone()
                });
            }
        }
        guests
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dhcp::lease::LeaseKind;

    fn mac(last: u8) -> Mac {
        Mac([0x52, 0x54, 0, 0, 0, last])
    }

    fn station(last: u8, port: u16) -> Station {
        Station {
            mac: mac(last),
            port: PortId(port),
        }
    }

    fn port(id: u16) -> PortStatus {
        PortStatus {
            id,
            name: format!("vm{id}"),
            kind: "vmm".to_owned(),
            rx_bytes: 10,
            tx_bytes: 20,
            drops: [("a".to_owned(), 1), ("b".to_owned(), 2)].into(),
            attached_secs: 5,
            ..PortStatus::default()
        }
    }

    #[test]
    fn a_guest_is_put_together_from_what_is_known_of_its_mac() {
        let lease = LeaseView {
            address: [10, 0, 0, 2].into(),
            mac: mac(1),
            port: Some(PortId(1)),
            client_id: None,
            hostname: Some("Alice".parse().unwrap()),
            kind: LeaseKind::Bound,
            remaining: None,
        };
        let v6: Vec<Ipv6Addr> = ["fe80::1", "fd12::1", "fd12::2", "fd12::3"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let heard = [
            (IpAddr::from(v6[0]), station(1, 1)),
            (v6[1].into(), station(1, 1)),
            ([10, 0, 0, 2].into(), station(1, 1)),
            (v6[2].into(), station(1, 1)),
            ([10, 0, 0, 77].into(), station(3, 2)),
            // Of a MAC that is behind another port by now.
            ([10, 0, 0, 78].into(), station(1, 3)),
        ];
        let ports = [port(0), port(1), port(2), port(3), port(4)];
        let pieces = Pieces {
            ports: &ports,
            // The card of port 2 has another MAC than was made for it; port 4 has not spoken.
            given: &[station(1, 1), station(2, 2), station(4, 4)],
            given6: &[(mac(1), v6[3]), (mac(1), v6[2])],
            learned: &[station(5, 2), station(3, 2), station(1, 1)],
            leases: &[lease],
            heard: &heard,
        };
        let guests = pieces.guests();
        let first = GuestStatus {
            name: "vm1".to_owned(),
            port: 1,
            kind: "vmm".to_owned(),
            mac: Some(mac(1).to_string()),
            hostname: Some("alice".to_owned()),
            ipv4: vec![[10, 0, 0, 2].into()],
            ipv6: vec![v6[2], v6[1], v6[3]],
            received_bytes: 20,
            sent_bytes: 10,
            drops: 3,
            attached_secs: 5,
        };
        assert_eq!(guests[0], first);
        let rest: Vec<_> = guests[1..]
            .iter()
            .map(|guest| (guest.port, guest.mac.clone(), guest.ipv4.clone()))
            .collect();
        assert_eq!(
            rest,
            [
                (2, Some(mac(5).to_string()), vec![]),
                (2, Some(mac(3).to_string()), vec![[10, 0, 0, 77].into()]),
                (3, None, vec![]),
                (4, Some(mac(4).to_string()), vec![]),
            ]
        );
        assert_eq!(pieces.ports_of_macs()[&mac(1)], PortId(1));
    }

    #[test]
    fn one_port_does_not_fill_the_list() {
        let learned: Vec<_> = (0..200).map(|last| station(last, 1)).collect();
        let pieces = Pieces {
            ports: &[port(1)],
            given: &[],
            given6: &[],
            learned: &learned,
            leases: &[],
            heard: &[],
        };
        assert_eq!(pieces.guests().len(), SHOWN_MAX);
    }
}
