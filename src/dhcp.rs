//! The DHCPv4 server of the LAN (RFC 2131).
//!
//! # Path
//! A datagram for port 67 is parsed and checked ([`options::Request`]), its sender's hardware address
//! is compared with the frame's, the lease table ([`lease::LeaseTable`], shared by the workers)
//! decides, and the answer goes out at once, unless the address was not the client's before. Then the LAN is
//! asked first who has it (RFC 2131 3.1, 4.3.1), and the answer waits for [`PROBE_WAIT`] ([`probing`]).
//!
//! # Answers
//! | message | answered with |
//! |---|---|
//! | DISCOVER | OFFER; ACK if it asks for rapid commit (RFC 4039) |
//! | any, of a MAC that is another port's | nothing but an address of its own, by DISCOVER |
//! | REQUEST naming this server (SELECTING) | ACK, or NAK if the address is not the client's |
//! | REQUEST naming another server | nothing; the offer is withdrawn |
//! | REQUEST with option 50 (INIT-REBOOT) or `ciaddr` (RENEWING, REBINDING) | ACK or NAK |
//! | DECLINE | nothing; the address is kept back for [`lease::QUARANTINE_TIME`] |
//! | RELEASE | nothing; the lease ends |
//! | INFORM | ACK without lease |
//!
//! The server is the only one of its LAN, so it is authoritative (as dnsmasq's `--dhcp-authoritative`,
//! where RFC 2131 4.3.2 has servers stay silent about clients they don't know): a REQUEST for an
//! address that is free is granted, so that guests survive a lost lease file, and any other is
//! refused at once, so that a guest from another network doesn't wait for its time-outs.
//!
//! NAKs are broadcast. Offers and ACKs go to the client's MAC and address, or are broadcast if it
//! asked so with the broadcast flag and has no address yet (RFC 2131 4.1).
//!
//! # What a hostile guest can try
//! Take, end or move other guests' leases: the hardware address must be the frame's own
//! ([`DropReason::Spoofed`]), and a lease belongs to its port ([`lease`]); a message in the name of another
//! port's MAC is dropped and counted. Exhaust the pool, or answer every probe: see the limits in [`lease`].
//! Amplify: one answer per message, inside the LAN. Come through a relay: dropped.

pub mod lease;
pub mod options;
mod probing;

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use dhcproto::v4::{CLIENT_PORT, DhcpOption, MessageType, SERVER_PORT};

use self::probing::Probing;
pub use self::probing::{PENDING_MAX, PENDING_PER_PORT_MAX, PROBE_WAIT};
use crate::frame::{Instant, Mac, PortId, Station};
use crate::gateway::{Handled, LanConfig, Outbox, Service, arp, datagrams, service_counters};
use crate::offload::Offload;
use crate::stats::DropReason;
use crate::wire::{Ipv4, Packet, UDP4_PAYLOAD_AT, Udp, write_udp4};
use lease::{Client, Heard, LeaseTable, Probed, Refusal};
use options::{ReplyHeader, ReplyOptions, Request, write_reply};

/// Shortest lease that a client can ask for (option 51): shorter ones only make load. dnsmasq's
/// minimum too.
const LEASE_SECS_MIN: u32 = 120;
/// A lease time that means "for ever" (RFC 2131 3.3).
const LEASE_SECS_INFINITE: u32 = u32::MAX;

/// What the server tells its clients.
#[derive(Clone, Debug)]
pub struct DhcpConfig {
    /// The LAN; its MTU is announced.
    pub lan: LanConfig,
    /// First address of the pool.
    pub first: Ipv4Addr,
    /// Last address of the pool.
    pub last: Ipv4Addr,
    /// Lease time; [`u32::MAX`] is for ever.
    pub lease_secs: u32,
    /// Domain name (option 15), at most 253 bytes.
    pub domain: Option<String>,
    /// DNS server announced (option 6).
    pub dns: Ipv4Addr,
}

impl DhcpConfig {
    /// All of the LAN's addresses for an hour, DNS by the gateway.
    pub fn new(lan: LanConfig) -> Self {
        Self {
            first: Ipv4Addr::from_bits(lan.network().to_bits() + 1),
            last: Ipv4Addr::from_bits(lan.broadcast().to_bits() - 1),
            lease_secs: 3600,
            domain: None,
            dns: lan.address,
            lan,
        }
    }

    /// The pool, as [`LeaseTable::new`] takes it.
    pub fn range(&self) -> RangeInclusive<Ipv4Addr> {
        self.first..=self.last
    }
}

service_counters! {
    /// What the DHCP server did.
    DhcpCounters {
        /// DISCOVERs.
        discovers = "dhcp_discover",
        /// OFFERs sent.
        offers = "dhcp_offer",
        /// REQUESTs.
        requests = "dhcp_request",
        /// ACKs sent.
        acks = "dhcp_ack",
        /// NAKs sent.
        naks = "dhcp_nak",
        /// DECLINEs of an address that was the sender's.
        declines = "dhcp_decline",
        /// RELEASEs of an address that was the sender's.
        releases = "dhcp_release",
        /// INFORMs.
        informs = "dhcp_inform",
        /// Leases made by rapid commit.
        rapid_commits = "dhcp_rapid_commit",
        /// REQUESTs that took another server's offer.
        other_server = "dhcp_other_server",
        /// Messages that were none: cut short, wrong cookie, overrunning options.
        malformed = "dhcp_malformed",
        /// Clients left without an address because their MAC or port holds too many.
        limited = "dhcp_limited",
        /// Clients left without an address because none is free.
        exhausted = "dhcp_exhausted",
        /// Messages in the name of a MAC that is another port's.
        foreign = "dhcp_foreign_port",
        /// Addresses that the LAN was asked for before a client got them.
        probes = "dhcp_probes",
        /// Of those, what another station had.
        in_use = "dhcp_in_use",
        /// Claims of an address, of a port that claims or holds as many as it may.
        claims_ignored = "dhcp_claims_ignored",
    }
}

/// The DHCPv4 service.
pub struct DhcpServer {
    config: DhcpConfig,
    leases: Arc<Mutex<LeaseTable>>,
    probing: Probing,
    scratch: Vec<u8>,
    counters: DhcpCounters,
}

impl DhcpServer {
    /// A server that hands out `leases`.
    pub fn new(config: DhcpConfig, leases: Arc<Mutex<LeaseTable>>) -> Self {
        Self {
            config,
            leases,
            probing: Probing::default(),
            scratch: Vec::new(),
            counters: DhcpCounters::default(),
        }
    }

    /// The lease table. A panic elsewhere leaves it usable: every change completes or is not begun.
    fn leases(&self) -> std::sync::MutexGuard<'_, LeaseTable> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn datagram<'p, 'a>(&self, packet: &'p Packet<'a>) -> Option<(&'p Ipv4<'a>, &'p Udp<'a>)> {
        let (ip, udp) = packet.udp4()?;
        let lan = &self.config.lan;
        // A client that renews writes to the server's address, every other one broadcasts.
        let ours = [lan.address, Ipv4Addr::BROADCAST, lan.broadcast()].contains(&ip.destination);
        (udp.destination_port == SERVER_PORT && ours).then_some((ip, udp))
    }

    fn answer(
        &mut self,
        packet: &Packet<'_>,
        bytes: &[u8],
        now: Instant,
        out: &mut dyn Outbox,
    ) -> Handled {
        let request = Request::parse(bytes).inspect_err(|_| self.counters.malformed += 1)?;
        if request.mac != packet.source {
            return Err(DropReason::Spoofed);
        }
        if request.giaddr != Ipv4Addr::UNSPECIFIED {
            return Err(DropReason::Relayed);
        }
        let client = client_of(&request, packet.ingress);
        if self.probing.renew(&request, packet.ingress) {
            match request.kind {
                MessageType::Discover => self.counters.discovers += 1,
                _ => self.counters.requests += 1,
            }
            return Ok(());
        }
        match request.kind {
            MessageType::Discover => self.discover(&request, &client, now, out),
            MessageType::Request => self.request(&request, &client, now, out),
            MessageType::Decline => self.decline(&request, &client, now),
            MessageType::Release => self.release(&request, &client, now),
            MessageType::Inform => self.inform(&request, out),
            // What only servers send.
            MessageType::Offer | MessageType::Ack | MessageType::Nak => Err(DropReason::Malformed),
            _ => Err(DropReason::Unclaimed),
        }
    }

    fn discover(
        &mut self,
        request: &Request,
        client: &Client<'_>,
        now: Instant,
        out: &mut dyn Outbox,
    ) -> Handled {
        self.counters.discovers += 1;
        let (address, is_unprobed) = self.choose(request, client, now)?;
        if is_unprobed {
            return self.probe(request, client.port, address, now, out);
        }
        self.offer(request, client, address, now, out)
    }

    /// An address for a client, and whether the LAN has to be asked for it first.
    fn choose(
        &mut self,
        request: &Request,
        client: &Client<'_>,
        now: Instant,
    ) -> Result<(Ipv4Addr, bool), DropReason> {
        let mut leases = self.leases();
        let chosen = leases.offer(client, request.requested, now);
        let chosen = chosen.map(|address| (address, leases.is_unprobed(address)));
        drop(leases);
        chosen.map_err(|refusal| self.refuse(refusal, client))
    }

    fn offer(
        &mut self,
        request: &Request,
        client: &Client<'_>,
        address: Ipv4Addr,
        now: Instant,
        out: &mut dyn Outbox,
    ) -> Handled {
        let secs = self.lease_secs(request);
        if request.rapid_commit {
            let committed = self.leases().commit(client, address, secs, now);
            committed.map_err(|refusal| self.refuse(refusal, client))?;
            self.counters.rapid_commits += 1;
            self.acknowledge(request, address, secs, out);
        } else {
            self.counters.offers += 1;
            self.lease_reply(MessageType::Offer, request, address, secs, out);
        }
        Ok(())
    }

    /// RFC 2131 4.3.2; the client's state shows in which fields it filled in (table 4).
    fn request(
        &mut self,
        request: &Request,
        client: &Client<'_>,
        now: Instant,
        out: &mut dyn Outbox,
    ) -> Handled {
        self.counters.requests += 1;
        if request
            .server
            .is_some_and(|server| server != self.config.lan.address)
        {
            self.counters.other_server += 1;
            self.leases().withdraw(client, now);
            return Ok(());
        }
        let ciaddr = Some(request.ciaddr).filter(|address| !address.is_unspecified());
        let Some(address) = request.requested.or(ciaddr) else {
            self.counters.malformed += 1;
            return Err(DropReason::Malformed);
        };
        let (held, is_unprobed) = {
            let mut leases = self.leases();
            let held = match leases.knows(client, address, now) {
                true => Ok(()),
                false => leases.hold(client, address, now),
            };
            (held, leases.is_unprobed(address))
        };
        match held {
            Ok(()) if is_unprobed => self.probe(request, client.port, address, now, out),
            Ok(()) => self.grant(request, client, address, now, out),
            Err(refusal) => self.reject(request, client, refusal, out),
        }
    }

    fn grant(
        &mut self,
        request: &Request,
        client: &Client<'_>,
        address: Ipv4Addr,
        now: Instant,
        out: &mut dyn Outbox,
    ) -> Handled {
        let secs = self.lease_secs(request);
        let committed = self.leases().commit(client, address, secs, now);
        match committed {
            Ok(()) => self.acknowledge(request, address, secs, out),
            Err(refusal) => return self.reject(request, client, refusal, out),
        }
        Ok(())
    }

    /// Tells a client that it can't have its address: the broadcast would reach whose MAC it has taken.
    fn reject(
        &mut self,
        request: &Request,
        client: &Client<'_>,
        refusal: Refusal,
        out: &mut dyn Outbox,
    ) -> Handled {
        let reason = self.refuse(refusal, client);
        if refusal == Refusal::Foreign {
            return Err(reason);
        }
        self.counters.naks += 1;
        self.negative(request, refusal, out);
        Ok(())
    }

    fn decline(&mut self, request: &Request, client: &Client<'_>, now: Instant) -> Handled {
        let address = request.requested.ok_or(DropReason::Malformed)?;
        if !self.is_for_us(request) || !self.leases().decline(client, address, now) {
            return Err(self.no_lease(client, now));
        }
        self.counters.declines += 1;
        // Someone set this address by hand, or plays: a guest must not fill the log.
        let level = match self.counters.declines {
            1 => log::Level::Warn,
            _ => log::Level::Debug,
        };
        log::log!(
            level,
            "{} says that {address} is in use by another guest",
            client.mac
        );
        Ok(())
    }

    fn release(&mut self, request: &Request, client: &Client<'_>, now: Instant) -> Handled {
        if !self.is_for_us(request) || !self.leases().release(client, request.ciaddr, now) {
            return Err(self.no_lease(client, now));
        }
        self.counters.releases += 1;
        log::debug!("{} released {}", client.mac, request.ciaddr);
        Ok(())
    }

    fn no_lease(&mut self, client: &Client<'_>, now: Instant) -> DropReason {
        if !self.leases().is_foreign(client, now) {
            return DropReason::NoLease;
        }
        self.counters.foreign += 1;
        DropReason::Spoofed
    }

    /// RFC 2131 4.3.5: parameters for a client that has its address from elsewhere. No lease time, no
    /// `yiaddr`, and the client's binding is not looked at.
    fn inform(&mut self, request: &Request, out: &mut dyn Outbox) -> Handled {
        if !self.config.lan.is_guest(request.ciaddr) {
            return Err(DropReason::ForeignSource);
        }
        self.counters.informs += 1;
        self.counters.acks += 1;
        let options = ReplyOptions {
            required: self.identity(MessageType::Ack, request),
            offered: self.parameters(),
        };
        let header = ReplyHeader {
            ciaddr: request.ciaddr,
            yiaddr: Ipv4Addr::UNSPECIFIED,
        };
        self.send(
            request,
            header,
            &options,
            (request.mac, request.ciaddr),
            out,
        );
        Ok(())
    }

    fn is_for_us(&self, request: &Request) -> bool {
        request
            .server
            .is_none_or(|server| server == self.config.lan.address)
    }

    /// What the client asks for, within bounds.
    fn lease_secs(&self, request: &Request) -> u32 {
        let longest = self.config.lease_secs;
        let asked = request.lease_secs.unwrap_or(longest);
        asked.clamp(LEASE_SECS_MIN.min(longest), longest)
    }

    fn refuse(&mut self, refusal: Refusal, client: &Client<'_>) -> DropReason {
        log::debug!(
            "no address for {} on port {}: {refusal}",
            client.mac,
            client.port
        );
        match refusal {
            Refusal::Limit => self.counters.limited += 1,
            Refusal::Exhausted => self.counters.exhausted += 1,
            Refusal::Foreign => {
                self.counters.foreign += 1;
                return DropReason::Spoofed;
            }
            Refusal::OutOfPool
            | Refusal::NoGuest
            | Refusal::Taken
            | Refusal::Reserved
            | Refusal::MacTaken
            | Refusal::Mismatch => {}
        }
        DropReason::Limit
    }

    fn acknowledge(
        &mut self,
        request: &Request,
        address: Ipv4Addr,
        secs: u32,
        out: &mut dyn Outbox,
    ) {
        self.counters.acks += 1;
        log::debug!("{} has {address} for {secs} s", request.mac);
        self.lease_reply(MessageType::Ack, request, address, secs, out);
    }

    /// An OFFER or an ACK with a lease (RFC 2131 table 3).
    fn lease_reply(
        &mut self,
        kind: MessageType,
        request: &Request,
        address: Ipv4Addr,
        secs: u32,
        out: &mut dyn Outbox,
    ) {
        let mut required = self.identity(kind, request);
        required.push(DhcpOption::AddressLeaseTime(secs));
        if secs != LEASE_SECS_INFINITE {
            // RFC 2131 4.4.5: half and seven eighths of the lease.
            required.push(DhcpOption::Renewal(secs / 2));
            required.push(DhcpOption::Rebinding(secs - secs / 8));
        }
        if kind == MessageType::Ack && request.kind == MessageType::Discover {
            required.push(DhcpOption::RapidCommit);
        }
        let options = ReplyOptions {
            required,
            offered: self.parameters(),
        };
        let has_address = kind == MessageType::Ack && !request.ciaddr.is_unspecified();
        let header = ReplyHeader {
            ciaddr: if has_address {
                request.ciaddr
            } else {
                Ipv4Addr::UNSPECIFIED
            },
            yiaddr: address,
        };
        let to = if request.flags.broadcast() && !has_address {
            (Mac::BROADCAST, Ipv4Addr::BROADCAST)
        } else {
            (request.mac, address)
        };
        self.send(request, header, &options, to, out);
    }

    fn negative(&mut self, request: &Request, refusal: Refusal, out: &mut dyn Outbox) {
        let options = ReplyOptions {
            required: self.identity(MessageType::Nak, request),
            offered: vec![DhcpOption::Message(refusal.to_string())],
        };
        let header = ReplyHeader {
            ciaddr: Ipv4Addr::UNSPECIFIED,
            yiaddr: Ipv4Addr::UNSPECIFIED,
        };
        // RFC 2131 4.1: always broadcast, the client's address may be wrong.
        self.send(
            request,
            header,
            &options,
            (Mac::BROADCAST, Ipv4Addr::BROADCAST),
            out,
        );
    }

    /// Options of every reply. The type stands first: some boot ROMs look for it only there. The
    /// client's identifier is echoed (RFC 6842 3).
    fn identity(&self, kind: MessageType, request: &Request) -> Vec<DhcpOption> {
        let mut options = vec![
            DhcpOption::MessageType(kind),
            DhcpOption::ServerIdentifier(self.config.lan.address),
        ];
        if let Some(id) = &request.client_id {
            options.push(DhcpOption::ClientIdentifier(id.clone()));
        }
        options
    }

    fn parameters(&self) -> Vec<DhcpOption> {
        let DhcpConfig {
            lan, domain, dns, ..
        } = &self.config;
        let mut options = vec![
            DhcpOption::SubnetMask(lan.mask()),
            DhcpOption::Router(vec![lan.address]),
            DhcpOption::DomainNameServer(vec![*dns]),
            DhcpOption::InterfaceMtu(lan.mtu),
            DhcpOption::BroadcastAddr(lan.broadcast()),
        ];
        if let Some(domain) = domain {
            options.push(DhcpOption::DomainName(domain.clone()));
        }
        options
    }

    fn send(
        &mut self,
        request: &Request,
        header: ReplyHeader,
        options: &ReplyOptions,
        (mac, address): (Mac, Ipv4Addr),
        out: &mut dyn Outbox,
    ) {
        let lan = &self.config.lan;
        write_reply(&mut self.scratch, request, header, options, lan.mtu);
        let buffer = out.buffer();
        buffer[UDP4_PAYLOAD_AT..][..self.scratch.len()].copy_from_slice(&self.scratch);
        let len = write_udp4(
            buffer,
            (lan.mac, lan.address, SERVER_PORT),
            (mac, address, CLIENT_PORT),
            self.scratch.len(),
        );
        out.send(len, Offload::default());
    }
}

/// Who sent a message.
fn client_of(request: &Request, port: PortId) -> Client<'_> {
    Client {
        mac: request.mac,
        id: request.client_id.as_deref(),
        port,
        hostname: request.hostname.as_ref(),
    }
}

impl Service for DhcpServer {
    fn name(&self) -> &'static str {
        "dhcp"
    }

    fn claims(&self, packet: &Packet<'_>) -> bool {
        self.datagram(packet).is_some()
    }

    fn handle(&mut self, packet: &Packet<'_>, now: Instant, out: &mut dyn Outbox) -> Handled {
        let (_, udp) = self.datagram(packet).ok_or(DropReason::Unclaimed)?;
        let mut handled = Ok(());
        for bytes in datagrams(packet.offload, udp) {
            handled = handled.and(self.answer(packet, bytes, now, out));
        }
        handled
    }

    fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counters.iter()
    }
}

#[cfg(test)]
mod tests;
