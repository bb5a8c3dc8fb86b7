//! RFC 2131 message by message, with the fields that real clients send.

use super::*;
use crate::frame::Duration;
use crate::gateway::testing::{GUEST, Kept, PORT, lan, parse, udp_frame};
use crate::wire::Body;
use dhcproto::Decodable;
use dhcproto::v4::{DhcpOptions, Message, Opcode, OptionCode};

const XID: u32 = 0x1234_5678;
const BROADCAST: u16 = 0x8000;

/// A client's message, built field by field.
#[derive(Clone)]
struct Sent {
    mac: Mac,
    source: Ipv4Addr,
    destination: Ipv4Addr,
    ciaddr: Ipv4Addr,
    flags: u16,
    options: Vec<u8>,
}

fn sent(kind: u8) -> Sent {
    Sent {
        mac: GUEST,
        source: Ipv4Addr::UNSPECIFIED,
        destination: Ipv4Addr::BROADCAST,
        ciaddr: Ipv4Addr::UNSPECIFIED,
        flags: 0,
        options: vec![53, 1, kind],
    }
}

impl Sent {
    fn option(mut self, code: u8, data: &[u8]) -> Self {
        self.options.extend_from_slice(&[code, data.len() as u8]);
        self.options.extend_from_slice(data);
        self
    }

    fn wants(self, address: Ipv4Addr) -> Self {
        self.option(50, &address.octets())
    }

    fn server(self, address: Ipv4Addr) -> Self {
        self.option(54, &address.octets())
    }

    fn ciaddr(self, ciaddr: Ipv4Addr) -> Self {
        Self {
            ciaddr,
            source: ciaddr,
            ..self
        }
    }

    fn unicast(self) -> Self {
        Self {
            destination: lan().address,
            ..self
        }
    }

    fn flags(self, flags: u16) -> Self {
        Self { flags, ..self }
    }

    fn mac(self, mac: Mac) -> Self {
        Self { mac, ..self }
    }

    fn payload(&self) -> Vec<u8> {
        let mut bytes = vec![0; 240];
        bytes[..3].copy_from_slice(&[1, 1, 6]);
        bytes[4..8].copy_from_slice(&XID.to_be_bytes());
        bytes[10..12].copy_from_slice(&self.flags.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.ciaddr.octets());
        bytes[28..34].copy_from_slice(&self.mac.0);
        bytes[236..240].copy_from_slice(&[99, 130, 83, 99]);
        bytes.extend_from_slice(&self.options);
        bytes.push(255);
        bytes
    }

    fn frame(&self) -> Vec<u8> {
        let mac = if self.destination == lan().address {
            lan().mac
        } else {
            Mac::BROADCAST
        };
        let to = (mac, self.destination, 67);
        let mut frame = udp_frame((self.source, 68), to, &self.payload());
        frame[6..12].copy_from_slice(&self.mac.0);
        frame
    }
}

/// A reply, and where it went.
struct Got {
    mac: Mac,
    address: Ipv4Addr,
    message: Message,
    bytes: Vec<u8>,
}

impl Got {
    fn kind(&self) -> MessageType {
        self.message.opts().msg_type().expect("option 53")
    }

    fn opts(&self) -> &DhcpOptions {
        self.message.opts()
    }

    /// Codes in the order of the wire.
    fn codes(&self) -> Vec<u8> {
        let (mut codes, mut at) = (Vec::new(), 240);
        while self.bytes[at] != 255 {
            codes.push(self.bytes[at]);
            at += 2 + usize::from(self.bytes[at + 1]);
        }
        assert!(
            self.bytes[at + 1..].iter().all(|&byte| byte == 0),
            "zero padding"
        );
        codes
    }
}

struct Lab {
    server: DhcpServer,
    out: Kept,
    now: Instant,
}

impl Lab {
    fn new() -> Self {
        let mut config = DhcpConfig::new(lan());
        config.domain = Some("lan.example".to_owned());
        Self::with(config)
    }

    fn with(config: DhcpConfig) -> Self {
        let leases = LeaseTable::new(config.range(), &config.lan).unwrap();
        Self {
            server: DhcpServer::new(config, Arc::new(Mutex::new(leases))),
            out: Kept::new(),
            now: Instant::from_secs(1_000),
        }
    }

    fn handle(&mut self, frame: &[u8]) -> Handled {
        self.handle_from(PORT, frame)
    }

    fn handle_from(&mut self, port: PortId, frame: &[u8]) -> Handled {
        let mut packet = parse(frame);
        packet.ingress = port;
        assert!(self.server.claims(&packet));
        self.server.handle(&packet, self.now, &mut self.out)
    }

    /// Lets the wait for answers to a probe pass, if there is one.
    fn settle(&mut self) {
        if let Some(due) = self.server.poll_timeout() {
            self.now = due;
            self.server.handle_timeout(due, &mut self.out);
        }
    }

    /// A station on a port says by ARP that it has an address.
    fn arp(&mut self, (port, mac): (PortId, Mac), address: Ipv4Addr) {
        let mut frame = vec![0; 60];
        frame[..6].fill(0xff);
        frame[6..12].copy_from_slice(&mac.0);
        frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        frame[22..28].copy_from_slice(&mac.0);
        frame[28..32].copy_from_slice(&address.octets());
        let mut packet = parse(&frame);
        packet.ingress = port;
        self.server.observe(&packet, self.now);
    }

    /// What the probe asks for that was just sent.
    fn probed(&mut self) -> Ipv4Addr {
        let probe = self.out.take();
        assert_eq!(Mac::at(&probe, 0), Mac::BROADCAST);
        assert_eq!(
            (Mac::at(&probe, 6), Mac::at(&probe, 22)),
            (lan().mac, lan().mac)
        );
        assert_eq!(
            probe[12..22],
            [8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            "an ARP request"
        );
        assert_eq!(probe[28..38], [0; 10], "of nobody");
        assert_eq!(self.server.poll_timeout(), Some(self.now + PROBE_WAIT));
        Ipv4Addr::from(<[u8; 4]>::try_from(&probe[38..42]).unwrap())
    }

    /// The answer, after the probe where there has to be one, which nobody answers.
    fn ask(&mut self, sent: &Sent) -> Got {
        assert_eq!(self.handle(&sent.frame()), Ok(()));
        if self.server.poll_timeout().is_some() {
            self.probed();
            self.settle();
        }
        let frame = self.out.take();
        let packet = parse(&frame);
        let Body::Ipv4(ip) = packet.body else {
            panic!()
        };
        let (_, udp) = packet.udp4().unwrap();
        assert_eq!((packet.source, ip.source), (lan().mac, lan().address));
        assert_eq!((udp.source_port, udp.destination_port), (67, 68));
        let bytes = udp.payload.to_vec();
        assert!(bytes.len() >= 300 && bytes.len() <= 548, "{}", bytes.len());
        let message = Message::from_bytes(&bytes).unwrap();
        assert_eq!(message.opcode(), Opcode::BootReply);
        assert_eq!((message.xid(), message.chaddr()), (XID, &sent.mac.0[..]));
        assert_eq!(message.giaddr(), Ipv4Addr::UNSPECIFIED);
        assert_eq!(u16::from(message.flags()), sent.flags);
        assert_eq!(bytes[240..242], [53, 1], "the type stands first");
        assert_eq!(
            message.opts().get(OptionCode::ServerIdentifier),
            Some(&DhcpOption::ServerIdentifier(lan().address))
        );
        Got {
            mac: packet.destination,
            address: ip.destination,
            message,
            bytes,
        }
    }

    fn silent(&mut self, sent: &Sent) -> Handled {
        let handled = self.handle(&sent.frame());
        assert!(self.out.frames.is_empty(), "no answer");
        handled
    }

    fn lease(&mut self) -> Ipv4Addr {
        let offer = self.ask(&sent(1));
        assert_eq!(offer.kind(), MessageType::Offer);
        let address = offer.message.yiaddr();
        let ack = self.ask(&sent(3).wants(address).server(lan().address));
        assert_eq!(
            (ack.kind(), ack.message.yiaddr()),
            (MessageType::Ack, address)
        );
        address
    }

    fn holder(&self, address: Ipv4Addr) -> Option<Mac> {
        self.server
            .leases()
            .holder(address, self.now)
            .map(|(mac, _)| mac)
    }
}

fn elsewhere() -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, 9)
}

#[test]
fn offer_and_ack_carry_the_configuration() {
    let mut lab = Lab::new();
    let offer = lab.ask(&sent(1));
    let address = offer.message.yiaddr();
    assert!(lan().is_guest(address));
    assert_eq!(lab.holder(address), None, "an offer is no lease");
    let ack = lab.ask(&sent(3).wants(address).server(lan().address));
    assert_eq!(lab.holder(address), Some(GUEST));
    for (got, kind) in [(&offer, MessageType::Offer), (&ack, MessageType::Ack)] {
        assert_eq!(got.kind(), kind);
        assert_eq!((got.mac, got.address), (GUEST, address), "unicast");
        assert_eq!(got.message.ciaddr(), Ipv4Addr::UNSPECIFIED);
        for option in [
            DhcpOption::AddressLeaseTime(3600),
            DhcpOption::Renewal(1800),
            DhcpOption::Rebinding(3150),
            DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)),
            DhcpOption::Router(vec![lan().address]),
            DhcpOption::DomainNameServer(vec![lan().address]),
            DhcpOption::DomainName("lan.example".to_owned()),
            DhcpOption::InterfaceMtu(1500),
            DhcpOption::BroadcastAddr(lan().broadcast()),
        ] {
            assert_eq!(got.opts().get(OptionCode::from(&option)), Some(&option));
        }
        assert_eq!(got.codes(), [53, 54, 51, 58, 59, 1, 3, 6, 26, 28, 15]);
    }
}

#[test]
fn the_clients_order_after_the_mask() {
    let mut lab = Lab::new();
    let codes = |got: &Got| got.codes()[5..].to_vec();
    // busybox udhcpc.
    let udhcpc = sent(1)
        .option(61, &[&[1][..], &GUEST.0].concat())
        .option(57, &[2, 64])
        .option(55, &[1, 3, 6, 12, 15, 28, 42])
        .option(60, b"udhcp 1.35.0");
    let got = lab.ask(&udhcpc);
    assert_eq!(codes(&got)[1..], [1, 3, 6, 15, 28, 26]);
    assert_eq!(
        got.opts().get(OptionCode::ClientIdentifier),
        Some(&DhcpOption::ClientIdentifier([&[1][..], &GUEST.0].concat())),
        "RFC 6842"
    );
    // Router before mask is refused (RFC 2132 3.3); repeats and unknown codes are nothing.
    let got = lab.ask(&sent(1).option(55, &[15, 15, 3, 250, 1, 6, 26, 119, 28]));
    assert_eq!(codes(&got), [1, 15, 3, 6, 26, 28]);
}

/// RFC 2131 4.3.2, table 4: what each client state sends, and what it is answered.
#[test]
fn request_in_every_client_state() {
    enum Has {
        Nothing,
        Lease,
        EndedLease,
    }
    use Has::*;
    let server = lan().address;
    let ack = Some(MessageType::Ack);
    let nak = Some(MessageType::Nak);
    type Make = fn(Ipv4Addr, Ipv4Addr) -> Sent;
    let selecting: Make = |own, server| sent(3).wants(own).server(server);
    let reboot: Make = |own, _| sent(3).wants(own);
    let renewing: Make = |own, _| sent(3).ciaddr(own).unicast();
    let rebinding: Make = |own, _| sent(3).ciaddr(own);
    for (name, has, make, own_address, answer) in [
        ("selecting", Lease, selecting, true, ack),
        ("selecting, lease ended", EndedLease, selecting, true, ack),
        ("selecting another address", Lease, selecting, false, nak),
        ("selecting without discover", Nothing, selecting, false, ack),
        ("init-reboot", Lease, reboot, true, ack),
        ("init-reboot, lease ended", EndedLease, reboot, true, ack),
        ("init-reboot, wrong address", Lease, reboot, false, nak),
        ("init-reboot, unknown, free", Nothing, reboot, false, ack),
        ("renewing", Lease, renewing, true, ack),
        ("renewing, lease ended", EndedLease, renewing, true, ack),
        ("renewing, unknown, free", Nothing, renewing, false, ack),
        ("renewing another address", Lease, renewing, false, nak),
        ("rebinding", Lease, rebinding, true, ack),
        ("rebinding another address", Lease, rebinding, false, nak),
        ("rebinding, unknown, free", Nothing, rebinding, false, ack),
    ] {
        let mut lab = Lab::new();
        let own = match has {
            Nothing => None,
            Lease | EndedLease => Some(lab.lease()),
        };
        if matches!(has, EndedLease) {
            lab.now += Duration::from_secs(4_000);
        }
        let free = Ipv4Addr::new(192, 168, 122, 200);
        let other = own.map_or(free, |own| Ipv4Addr::from_bits(own.to_bits() ^ 2));
        let asked = own.filter(|_| own_address).unwrap_or(other);
        let request = make(asked, server);
        let got = lab.ask(&request);
        assert_eq!(Some(got.kind()), answer, "{name}");
        if got.kind() == MessageType::Ack {
            assert_eq!(got.message.yiaddr(), asked, "{name}");
            assert_eq!((got.mac, got.address), (GUEST, asked), "{name}");
            assert_eq!(got.message.ciaddr(), request.ciaddr, "{name}");
            assert_eq!(lab.holder(asked), Some(GUEST), "{name}");
        }
    }
}

#[test]
fn naks_are_broadcast_and_bare() {
    let mut lab = Lab::new();
    let id = [&[0xff][..], &[7; 254]].concat();
    for request in [
        sent(3).wants(elsewhere()),
        sent(3).wants(elsewhere()).server(lan().address),
        sent(3).ciaddr(elsewhere()),
        sent(3).ciaddr(elsewhere()).unicast(),
        sent(3).wants(lan().address),
        sent(3).wants(lan().broadcast()).option(61, &id),
    ] {
        let got = lab.ask(&request);
        assert_eq!(got.kind(), MessageType::Nak);
        assert_eq!(
            (got.mac, got.address),
            (Mac::BROADCAST, Ipv4Addr::BROADCAST)
        );
        let addresses = (
            got.message.ciaddr(),
            got.message.yiaddr(),
            got.message.siaddr(),
        );
        let none = Ipv4Addr::UNSPECIFIED;
        assert_eq!(addresses, (none, none, none));
        assert!(
            got.codes()
                .iter()
                .all(|code| [53, 54, 61, 56].contains(code)),
            "{:?}",
            got.codes()
        );
    }
    assert_eq!(lab.server.counters.naks, 6);
}

#[test]
fn an_address_in_use_is_refused_to_others() {
    let mut lab = Lab::new();
    let taken = lab.lease();
    let second = Mac([0x52, 0x54, 0, 0, 0, 8]);
    let got = lab.ask(&sent(3).wants(taken).mac(second));
    assert_eq!(got.kind(), MessageType::Nak);
    let got = lab.ask(&sent(1).wants(taken).mac(second));
    assert_ne!(got.message.yiaddr(), taken);
    assert_eq!(lab.holder(taken), Some(GUEST));
}

#[test]
fn another_servers_offer_is_respected() {
    let mut lab = Lab::new();
    let offered = lab.ask(&sent(1)).message.yiaddr();
    let request = sent(3).wants(elsewhere()).server(elsewhere());
    assert_eq!(lab.silent(&request), Ok(()));
    assert_eq!(lab.server.counters.other_server, 1);
    assert!(
        lab.server.leases().snapshot(lab.now).is_empty(),
        "{offered} is free again"
    );
}

#[test]
fn the_broadcast_flag_is_honoured_without_an_address() {
    let mut lab = Lab::new();
    let everyone = (Mac::BROADCAST, Ipv4Addr::BROADCAST);
    let offer = lab.ask(&sent(1).flags(BROADCAST));
    assert_eq!((offer.mac, offer.address), everyone);
    let own = offer.message.yiaddr();
    let ack = lab.ask(&sent(3).wants(own).server(lan().address).flags(BROADCAST));
    assert_eq!((ack.mac, ack.address), everyone);
    let renewed = lab.ask(&sent(3).ciaddr(own).unicast().flags(BROADCAST));
    assert_eq!(
        (renewed.mac, renewed.address),
        (GUEST, own),
        "RFC 2131 4.1: ciaddr first"
    );
}

#[test]
fn rapid_commit() {
    let mut lab = Lab::new();
    // dhcpcd: DUID client identifier, rapid commit.
    let duid = [
        0xff, 0, 0, 0, 1, 0, 1, 0, 1, 0x2a, 1, 2, 3, 4, 5, 6, 7, 8, 9,
    ];
    let discover = sent(1)
        .option(61, &duid)
        .option(80, &[])
        .option(55, &[1, 3, 6]);
    let ack = lab.ask(&discover);
    assert_eq!(ack.kind(), MessageType::Ack);
    assert_eq!(lab.holder(ack.message.yiaddr()), Some(GUEST));
    assert!(ack.opts().get(OptionCode::RapidCommit).is_some());
    assert_eq!(lab.server.counters.rapid_commits, 1);
    let plain = lab.ask(
        &sent(3)
            .wants(ack.message.yiaddr())
            .option(61, &duid)
            .option(80, &[]),
    );
    assert!(plain.opts().get(OptionCode::RapidCommit).is_none());
}

#[test]
fn decline_quarantines_and_release_ends() {
    let mut lab = Lab::new();
    let own = lab.lease();
    let second = Mac([0x52, 0x54, 0, 0, 0, 8]);
    let server = lan().address;
    for forged in [
        sent(4).wants(own).server(server).mac(second),
        sent(4).wants(elsewhere()).server(server),
        sent(4).wants(own).server(elsewhere()),
        sent(7).ciaddr(own).server(server).mac(second),
        sent(7).ciaddr(elsewhere()).server(server),
        sent(7).ciaddr(own).server(elsewhere()),
    ] {
        assert_eq!(lab.silent(&forged), Err(DropReason::NoLease));
    }
    assert_eq!(
        lab.silent(&sent(4).server(server)),
        Err(DropReason::Malformed)
    );
    assert_eq!(lab.holder(own), Some(GUEST));
    assert_eq!(lab.silent(&sent(4).wants(own).server(server)), Ok(()));
    let next = lab.lease();
    assert_ne!(next, own, "a declined address is not offered again");
    assert_eq!(
        lab.silent(&sent(7).ciaddr(next).server(server).unicast()),
        Ok(())
    );
    assert_eq!(lab.holder(next), None);
    assert_eq!(lab.lease(), next, "a released one is remembered");
    let counters = &lab.server.counters;
    assert_eq!((counters.declines, counters.releases), (1, 1));
}

#[test]
fn inform_gets_parameters_and_no_lease() {
    let mut lab = Lab::new();
    let own = Ipv4Addr::new(192, 168, 122, 240);
    let got = lab.ask(&sent(8).ciaddr(own).option(55, &[6, 15]));
    assert_eq!(got.kind(), MessageType::Ack);
    assert_eq!((got.mac, got.address), (GUEST, own));
    assert_eq!(
        (got.message.ciaddr(), got.message.yiaddr()),
        (own, Ipv4Addr::UNSPECIFIED)
    );
    assert_eq!(got.codes(), [53, 54, 1, 6, 15, 3, 26, 28], "no 51, 58, 59");
    assert!(lab.server.leases().snapshot(lab.now).is_empty());
    for foreign in [
        Ipv4Addr::UNSPECIFIED,
        elsewhere(),
        lan().address,
        lan().broadcast(),
    ] {
        assert_eq!(
            lab.silent(&sent(8).ciaddr(foreign)),
            Err(DropReason::ForeignSource)
        );
    }
}

#[test]
fn lease_times_within_bounds() {
    let mut lab = Lab::new();
    let secs = |lab: &mut Lab, asked: u32| {
        let got = lab.ask(&sent(1).option(51, &asked.to_be_bytes()));
        match got.opts().get(OptionCode::AddressLeaseTime) {
            Some(DhcpOption::AddressLeaseTime(secs)) => *secs,
            _ => panic!("no lease time"),
        }
    };
    assert_eq!(secs(&mut lab, 0), 120);
    assert_eq!(secs(&mut lab, 600), 600);
    assert_eq!(secs(&mut lab, u32::MAX), 3600);
    let mut forever = Lab::with(DhcpConfig {
        lease_secs: u32::MAX,
        ..DhcpConfig::new(lan())
    });
    assert_eq!(secs(&mut forever, u32::MAX), u32::MAX);
    assert_eq!(
        forever.ask(&sent(1)).codes()[..4],
        [53, 54, 51, 1],
        "no T1, T2"
    );
    let mut short = Lab::with(DhcpConfig {
        lease_secs: 10,
        ..DhcpConfig::new(lan())
    });
    assert_eq!(secs(&mut short, 1), 10);
}

#[test]
fn renewal_extends() {
    let mut lab = Lab::new();
    let own = lab.lease();
    for _ in 0..10 {
        lab.now += Duration::from_secs(1_800);
        lab.ask(&sent(3).ciaddr(own).unicast());
    }
    assert_eq!(lab.holder(own), Some(GUEST));
    lab.now += Duration::from_secs(3_600);
    assert_eq!(lab.holder(own), None);
}

#[test]
fn exhaustion_is_silence_for_discover_and_nak_for_request() {
    let mut config = DhcpConfig::new(lan());
    config.first = Ipv4Addr::new(192, 168, 122, 50);
    config.last = config.first;
    let mut lab = Lab::with(config);
    lab.server.leases().open_port(PORT, None);
    let own = lab.lease();
    let second = Mac([0x52, 0x54, 0, 0, 0, 8]);
    let refused = lab.handle_from(THIEF, &sent(1).mac(second).frame());
    assert_eq!(refused, Err(DropReason::Limit));
    assert!(lab.out.frames.is_empty());
    assert_eq!(lab.server.counters.exhausted, 1);
    assert_eq!(
        lab.ask(&sent(3).wants(own).mac(second)).kind(),
        MessageType::Nak
    );
}

#[test]
fn big_requests_and_long_answers() {
    // iPXE asks for some thirty options and sends as many; the longest identifier and domain.
    let mut config = DhcpConfig::new(lan());
    config.domain = Some("d".repeat(253));
    let mut lab = Lab::with(config);
    let all: Vec<u8> = (1..=254).collect();
    let id = vec![0xff; 255];
    let ipxe = sent(1)
        .option(57, &1472u16.to_be_bytes())
        .option(93, &[0, 0])
        .option(94, &[1, 2, 1])
        .option(60, b"PXEClient:Arch:00000:UNDI:002001")
        .option(77, b"iPXE")
        .option(97, &[0; 17])
        .option(175, &[7; 60])
        .option(55, &all)
        .option(61, &id);
    let frame = ipxe.frame();
    assert_eq!(lab.handle(&frame), Ok(()));
    lab.probed();
    lab.settle();
    let reply = lab.out.take();
    assert!(
        reply.len() > 548 && reply.len() <= 14 + 1472,
        "{}",
        reply.len()
    );
    // Who takes less gets what is required, and what fits.
    let got = lab.ask(&sent(1).option(55, &[15, 3]).option(61, &id));
    assert_eq!(
        got.codes(),
        [53, 54, 61, 51, 58, 59, 1, 3, 6, 26],
        "547 of 548 bytes"
    );
    let tiny = lab.ask(&sent(1).option(57, &[0, 10]));
    assert_eq!(
        tiny.codes(),
        [53, 54, 51, 58, 59, 1, 3, 6, 26, 28],
        "576 at least; the domain is too long"
    );
}

#[test]
fn overloaded_and_split_options() {
    let mut lab = Lab::new();
    let mut payload = sent(1).option(52, &[3]).payload();
    payload[108..115].copy_from_slice(&[50, 4, 192, 168, 122, 66, 255]);
    payload[44..49].copy_from_slice(&[12, 2, b'v', b'm', 255]);
    let to = (Mac::BROADCAST, Ipv4Addr::BROADCAST, 67);
    assert_eq!(
        lab.handle(&udp_frame((Ipv4Addr::UNSPECIFIED, 68), to, &payload)),
        Ok(())
    );
    lab.out.take();
    let view = &lab.server.leases().snapshot(lab.now)[0];
    assert_eq!(view.address, Ipv4Addr::new(192, 168, 122, 66));
    assert_eq!(view.hostname, "vm".parse().ok());
    // RFC 3396: one option in two parts.
    let split = sent(3).option(50, &[192, 168]).option(50, &[122, 66]);
    assert_eq!(
        lab.ask(&split).message.yiaddr(),
        Ipv4Addr::new(192, 168, 122, 66)
    );
}

#[test]
fn what_is_no_request_is_dropped_with_its_reason() {
    let good = sent(1).payload();
    let with = |at: usize, value: u8| {
        let mut bad = good.clone();
        bad[at] = value;
        bad
    };
    let options = |options: &[u8]| {
        let mut bad = good[..240].to_vec();
        bad.extend_from_slice(options);
        bad
    };
    let mut group = good.clone();
    group[28] |= 1;
    let mut no_mac = good.clone();
    no_mac[28..34].fill(0);
    for (name, payload, reason) in [
        ("empty", vec![], DropReason::Truncated),
        (
            "no cookie's room",
            good[..239].to_vec(),
            DropReason::Truncated,
        ),
        ("a reply", with(0, 2), DropReason::Malformed),
        ("another hardware type", with(1, 6), DropReason::Malformed),
        ("hlen 0", with(2, 0), DropReason::Malformed),
        ("hlen 16", with(2, 16), DropReason::Malformed),
        ("hlen 17", with(2, 17), DropReason::Malformed),
        ("hlen 255", with(2, 255), DropReason::Malformed),
        ("wrong cookie", with(236, 98), DropReason::Malformed),
        ("group chaddr", group, DropReason::Malformed),
        ("zero chaddr", no_mac, DropReason::Malformed),
        ("someone else's chaddr", with(33, 99), DropReason::Spoofed),
        ("through a relay", with(24, 10), DropReason::Relayed),
        ("BOOTP", options(&[255]), DropReason::Unclaimed),
        ("no options at all", options(&[]), DropReason::Unclaimed),
        (
            "an option without length",
            options(&[53, 1, 1, 50]),
            DropReason::Malformed,
        ),
        (
            "an overrunning option",
            options(&[53, 1, 1, 12, 9, b'x']),
            DropReason::Malformed,
        ),
        (
            "a type of two bytes",
            options(&[53, 2, 1, 1, 255]),
            DropReason::Malformed,
        ),
        (
            "a type of no byte",
            options(&[53, 0, 255]),
            DropReason::Malformed,
        ),
        (
            "a short address",
            options(&[53, 1, 3, 50, 3, 1, 2, 3, 255]),
            DropReason::Malformed,
        ),
        (
            "an unknown type",
            options(&[53, 1, 99, 255]),
            DropReason::Unclaimed,
        ),
        (
            "a server's OFFER",
            options(&[53, 1, 2, 255]),
            DropReason::Malformed,
        ),
        (
            "a REQUEST for nothing",
            options(&[53, 1, 3, 255]),
            DropReason::Malformed,
        ),
        (
            "a long identifier",
            {
                let part = [&[61, 200][..], &[9; 200]].concat();
                options(&[&[53, 1, 1][..], &part, &part].concat())
            },
            DropReason::Malformed,
        ),
        (
            "overload into rubbish",
            {
                let mut bad = sent(1).option(52, &[1]).payload();
                bad[108..236].fill(7);
                bad
            },
            DropReason::Malformed,
        ),
    ] {
        let mut lab = Lab::new();
        let to = (Mac::BROADCAST, Ipv4Addr::BROADCAST, 67);
        let frame = udp_frame((Ipv4Addr::UNSPECIFIED, 68), to, &payload);
        assert_eq!(lab.handle(&frame), Err(reason), "{name}");
        assert!(lab.out.frames.is_empty(), "{name}");
        assert!(lab.server.leases().snapshot(lab.now).is_empty(), "{name}");
    }
}

#[test]
fn of_a_long_name_the_hosts_part_is_kept() {
    let mut lab = Lab::new();
    let long = format!("Web-1.{}", "a-department.".repeat(6)) + "example";
    lab.ask(&sent(1).option(12, long.as_bytes()));
    let views = lab.server.leases().snapshot(lab.now);
    assert_eq!(views[0].hostname, "web-1".parse().ok());
}

#[test]
fn harmless_oddities_are_served() {
    let mut lab = Lab::new();
    let mut no_end = sent(1);
    no_end.options = vec![0, 0, 53, 1, 1, 12, 3, b'v', b'm', 0, 61, 1, 9, 80, 1, 7, 0];
    let mut payload = no_end.payload();
    payload.pop();
    let to = (Mac::BROADCAST, lan().broadcast(), 67);
    // Another source port, the directed broadcast, a missing end, a NUL in the name, an identifier
    // and a rapid commit of the wrong length.
    let frame = udp_frame((Ipv4Addr::UNSPECIFIED, 1068), to, &payload);
    assert_eq!(lab.handle(&frame), Ok(()));
    assert_eq!(
        lab.server.leases().snapshot(lab.now)[0].hostname,
        "vm".parse().ok()
    );
}

#[test]
fn claims_the_server_port_alone() {
    let lab = Lab::new();
    let claims = |destination, port| {
        let frame = udp_frame(
            (Ipv4Addr::UNSPECIFIED, 68),
            (Mac::BROADCAST, destination, port),
            b"",
        );
        lab.server.claims(&parse(&frame))
    };
    for ours in [Ipv4Addr::BROADCAST, lan().broadcast(), lan().address] {
        assert!(claims(ours, 67));
        assert!(!claims(ours, 68));
    }
    assert!(!claims(Ipv4Addr::new(192, 168, 122, 9), 67));
    assert!(!claims(elsewhere(), 67));
}

#[test]
fn a_train_of_datagrams_is_taken_apart() {
    let mut lab = Lab::new();
    lab.lease();
    let mut payload = sent(1).payload();
    payload.resize(300, 0);
    let train = payload.repeat(3);
    let frame = udp_frame(
        (Ipv4Addr::UNSPECIFIED, 68),
        (Mac::BROADCAST, Ipv4Addr::BROADCAST, 67),
        &train,
    );
    let mut packet = parse(&frame);
    packet.offload.gso = crate::offload::Gso::Udp(300);
    assert_eq!(lab.server.handle(&packet, lab.now, &mut lab.out), Ok(()));
    assert_eq!(lab.out.frames.len(), 3);
    assert_eq!(packet.ingress, PORT);
}

const THIEF: PortId = PortId(66);

/// A guest with a lease, whose port lives, and a hostile one.
fn besieged() -> (Lab, Ipv4Addr) {
    let mut lab = Lab::new();
    lab.server.leases().open_port(PORT, None);
    lab.server.leases().open_port(THIEF, None);
    let own = lab.lease();
    (lab, own)
}

#[test]
fn messages_in_another_ports_name_change_nothing_of_its_guests() {
    let server = lan().address;
    let other = Ipv4Addr::new(192, 168, 122, 200);
    for id in [None, Some(&b"another"[..])] {
        type Make = fn(Ipv4Addr, Ipv4Addr) -> Sent;
        let forged: [(&str, Make); 6] = [
            ("release", |own, server| {
                sent(7).ciaddr(own).server(server).unicast()
            }),
            ("decline", |own, server| sent(4).wants(own).server(server)),
            ("selecting", |own, server| sent(3).wants(own).server(server)),
            ("init-reboot", |own, _| sent(3).wants(own)),
            ("renewing", |own, _| sent(3).ciaddr(own).unicast()),
            ("rebinding", |own, _| sent(3).ciaddr(own)),
        ];
        for (name, make) in forged {
            let (mut lab, own) = besieged();
            // A NAK would be broadcast, and heard by the guest.
            for address in [own, other] {
                let mut message = make(address, server);
                message.flags = BROADCAST;
                if let Some(id) = id {
                    message = message.option(61, id);
                }
                let handled = lab.handle_from(THIEF, &message.frame());
                assert_eq!(handled, Err(DropReason::Spoofed), "{name}");
            }
            assert!(lab.out.frames.is_empty(), "{name}");
            assert_eq!(lab.server.counters.foreign, 2, "{name}");
            assert_eq!(lab.holder(own), Some(GUEST), "{name}");
            assert_eq!(lab.ask(&sent(1)).message.yiaddr(), own, "{name}");
            let renewed = lab.ask(&sent(3).ciaddr(own).unicast());
            assert_eq!(renewed.kind(), MessageType::Ack, "{name}");
        }
        // Another server's offer, and a question for parameters.
        let (mut lab, _) = besieged();
        let offered = lab.ask(&sent(1)).message.yiaddr();
        let select = sent(3).wants(elsewhere()).server(elsewhere());
        assert_eq!(lab.handle_from(THIEF, &select.frame()), Ok(()));
        let inform = sent(8).ciaddr(offered);
        assert_eq!(lab.handle_from(THIEF, &inform.frame()), Ok(()));
        lab.out.take();
        assert_eq!(lab.ask(&sent(1)).message.yiaddr(), offered);
        // A host name leads forwards.
        let named = sent(1).option(12, b"bank");
        assert_eq!(lab.handle_from(THIEF, &named.frame()), Ok(()));
        assert_ne!(lab.probed(), offered, "it gets an address of its own");
        lab.settle();
        lab.out.take();
        let views = lab.server.leases().snapshot(lab.now);
        let guest = views.iter().find(|view| view.address == offered).unwrap();
        assert_eq!((&guest.hostname, guest.port), (&None, Some(PORT)));
    }
}

#[test]
fn nobody_has_an_address_before_it_is_offered() {
    let mut lab = Lab::new();
    let squatter = (THIEF, Mac([0x52, 0x54, 0, 0, 0, 9]));
    assert_eq!(lab.handle(&sent(1).frame()), Ok(()));
    let first = lab.probed();
    // Asked again meanwhile: it waits once, and the later question is answered.
    let again = sent(1).flags(BROADCAST);
    assert_eq!(lab.handle(&again.frame()), Ok(()));
    assert!(lab.out.frames.is_empty());
    lab.now += Duration::from_millis(100);
    lab.arp(squatter, first);
    lab.now += Duration::from_millis(199);
    lab.server.handle_timeout(lab.now, &mut lab.out);
    assert!(lab.out.frames.is_empty(), "before its time");
    lab.settle();
    let second = lab.probed();
    assert_ne!(second, first);
    lab.settle();
    let offer = lab.out.take();
    assert_eq!(Mac::at(&offer, 0), Mac::BROADCAST);
    let yiaddr = &offer[UDP4_PAYLOAD_AT + 16..][..4];
    assert_eq!(yiaddr, second.octets());
    let counters = &lab.server.counters;
    assert_eq!((counters.discovers, counters.offers), (2, 1));
    assert_eq!((counters.probes, counters.in_use), (2, 1));
    // Its own from here on: no probe, whether it takes it or asks anew.
    assert_eq!(lab.ask(&sent(1)).message.yiaddr(), second);
    assert_eq!(lab.lease(), second);
    lab.now += Duration::from_secs(10_000);
    assert_eq!(lab.lease(), second);
    assert_eq!(lab.server.counters.probes, 2);
    // What was heard in use is passed over at once.
    let other = Mac([0x52, 0x54, 0, 0, 0, 8]);
    assert_eq!(lab.handle(&sent(1).wants(first).mac(other).frame()), Ok(()));
    assert_ne!(lab.probed(), first);
}

#[test]
fn an_address_that_a_client_remembers_alone_is_probed_too() {
    let mut lab = Lab::new();
    let remembered = Ipv4Addr::new(192, 168, 122, 200);
    for (request, expected) in [
        (sent(3).wants(remembered), MessageType::Nak),
        (sent(3).ciaddr(remembered).unicast(), MessageType::Ack),
    ] {
        assert_eq!(lab.handle(&request.frame()), Ok(()));
        assert_eq!(lab.probed(), remembered);
        let who = match expected {
            MessageType::Nak => Mac([0x52, 0x54, 0, 0, 0, 9]),
            _ => GUEST,
        };
        lab.arp((THIEF, who), remembered);
        lab.settle();
        let answer = lab.out.take();
        let packet = parse(&answer);
        let message = Message::from_bytes(packet.udp4().unwrap().1.payload).unwrap();
        assert_eq!(message.opts().msg_type(), Some(expected));
        lab.server.leases().close_port(THIEF, lab.now);
    }
}

#[test]
fn what_waits_is_bounded_and_goes_with_its_port() {
    let mut lab = Lab::new();
    let nth = |n: usize| sent(1).mac(Mac([0x52, 0x54, 0, 7, (n >> 8) as u8, n as u8]));
    for n in 0..PENDING_PER_PORT_MAX {
        assert_eq!(lab.handle_from(THIEF, &nth(n).frame()), Ok(()));
    }
    let more = lab.handle_from(THIEF, &nth(999).frame());
    assert_eq!(more, Err(DropReason::Limit));
    assert_eq!(lab.server.counters.limited, 1);
    lab.out.frames.clear();
    assert_eq!(lab.handle(&sent(1).frame()), Ok(()), "another port's waits");
    lab.probed();
    lab.server.forget_port(THIEF);
    lab.settle();
    assert_eq!(lab.out.frames.len(), 1, "to the port that is there");
    assert_eq!(lab.server.poll_timeout(), None);
}

#[test]
fn a_guest_that_answers_every_probe_keeps_nobody_without_an_address() {
    let mut config = DhcpConfig::new(lan());
    config.first = Ipv4Addr::new(192, 168, 122, 10);
    config.last = Ipv4Addr::new(192, 168, 122, 15);
    let mut lab = Lab::with(config);
    lab.server.leases().open_port(THIEF, None);
    for n in 1..=3 {
        lab.server.leases().open_port(PortId(n), None);
        let guest = sent(1).mac(Mac([0x52, 0x54, 0, 1, 1, n as u8]));
        assert_eq!(lab.handle_from(PortId(n), &guest.frame()), Ok(()));
        let mut probes = 0;
        while lab.server.poll_timeout().is_some() {
            let asked = lab.probed();
            lab.arp((THIEF, Mac([0x52, 0x54, 0, 0, 0, probes])), asked);
            probes += 1;
            assert!(probes <= 4);
            lab.settle();
        }
        let offer = lab.out.take();
        assert_eq!(offer[UDP4_PAYLOAD_AT + 240..][..3], [53, 1, 2]);
    }
    assert!(lab.server.counters.claims_ignored > 0);
}
