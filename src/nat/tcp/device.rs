//! smoltcp's device: one packet in, frames to the guest out, within one call.

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{self, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::wire::HardwareAddress;

use super::syn::{Peer, TCP_HEADER_LEN, be32, family_of, ip_header_len};
use crate::frame::{ETH_HEADER_LEN, Instant};
use crate::gateway::Outbox;
use crate::offload::{Csum, Gso, Offload};
use crate::wire::{self, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Family, PROTO_TCP, Tcp, be16, checksum};

/// MTU that smoltcp believes in: its segments are super-frames.
const ENGINE_MTU: usize = 65_535;

/// Answers a segment of no flow, or a refused SYN, with RST (RFC 9293 3.10.7.1).
pub fn reset<O: Outbox + ?Sized>(packet: &[u8], peer: &Peer, now: Instant, out: &mut O) {
    let mut device = Device::new(Some(packet), peer, out, Window::ANY);
    let mut set = SocketSet::new(Vec::new());
    interface(0, now).poll_ingress_single(now, &mut device, &mut set);
}

/// An interface of 96 bytes that takes packets for any address.
pub fn interface(seed: u64, now: Instant) -> Interface {
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = seed;
    let mut interface = Interface::new(config, &mut Capabilities, now);
    interface.set_any_ip(true);
    interface
}

/// The window to show.
#[derive(Clone, Copy)]
pub struct Window {
    /// Our window scale.
    pub shift: u8,
    /// The largest.
    pub max: u32,
    /// Right edge of the newest one that was shown: a window never shrinks (RFC 9293 3.8.6).
    pub edge: u32,
}

impl Window {
    /// Whatever the engine says.
    const ANY: Self = Self {
        shift: 0,
        max: u32::MAX,
        edge: 0,
    };

    /// What to show of `window`, which is scaled by `scale`, beside this acknowledgment.
    fn bound(self, window: u32, scale: u8, acknowledged: u32) -> u32 {
        if self.max == u32::MAX {
            return window;
        }
        let shown = self.edge.wrapping_sub(acknowledged) as i32;
        let shown = shown.max(0).cast_unsigned().div_ceil(1 << scale);
        window.min((self.max >> scale).max(shown))
    }
}

/// What a sent segment told the guest.
#[derive(Clone, Copy)]
pub struct Shown {
    /// Sequence number.
    pub sequence: u32,
    /// Sequence number behind its data.
    pub end: u32,
    /// Acknowledgment number.
    pub acknowledged: u32,
    /// Right edge of the window.
    pub edge: u32,
    /// Our window scale.
    pub window_shift: u8,
    /// The window is less than what the engine has room for.
    pub is_bounded: bool,
}

/// smoltcp's device for the length of one call: at most one packet in, frames out as they are made.
pub struct Device<'a, O: ?Sized> {
    input: Option<&'a [u8]>,
    peer: &'a Peer,
    out: &'a mut O,
    window: Window,
    /// The newest segment that went out, if it was no RST.
    pub shown: Option<Shown>,
}

impl<'a, O: Outbox + ?Sized> Device<'a, O> {
    /// A device that gives `input` and sends to `peer` through `out`.
    pub fn new(input: Option<&'a [u8]>, peer: &'a Peer, out: &'a mut O, window: Window) -> Self {
        Self {
            input,
            peer,
            out,
            window,
            shown: None,
        }
    }
}

fn capabilities() -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ip;
    capabilities.max_transmission_unit = ENGINE_MTU;
    // Ingress was verified by `wire`; egress is left to the device or to `offload::fit`.
    capabilities.checksum = ChecksumCapabilities::ignored();
    capabilities
}

impl<O: Outbox + ?Sized> phy::Device for Device<'_, O> {
    type RxToken<'b>
        = RxToken<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = TxToken<'b, O>
    where
        Self: 'b;

    fn receive(&mut self, _now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let packet = self.input.take()?;
        let token = TxToken {
            peer: self.peer,
            out: self.out,
            window: self.window,
            shown: &mut self.shown,
        };
        Some((RxToken(packet), token))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Self::TxToken<'_>> {
        Some(TxToken {
            peer: self.peer,
            out: self.out,
            window: self.window,
            shown: &mut self.shown,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities()
    }
}

/// The packet to take in.
pub struct RxToken<'a>(&'a [u8]);

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// One frame to be made.
pub struct TxToken<'a, O: ?Sized> {
    peer: &'a Peer,
    out: &'a mut O,
    window: Window,
    shown: &'a mut Option<Shown>,
}

impl<O: Outbox + ?Sized> phy::TxToken for TxToken<'_, O> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let frame = &mut self.out.buffer()[..ETH_HEADER_LEN + len];
        let result = f(&mut frame[ETH_HEADER_LEN..]);
        // The engine answers what it finds wrong with IP by ICMP, too.
        if !is_tcp(&frame[ETH_HEADER_LEN..]) {
            return result;
        }
        let (offload, shown) = finish(frame, self.peer, self.window);
        *self.shown = shown;
        self.out.send(ETH_HEADER_LEN + len, offload);
        result
    }
}

/// Whether a packet of the engine's, which writes no options and no extension headers, is TCP.
fn is_tcp(packet: &[u8]) -> bool {
    let protocol_at = match family_of(packet) {
        Family::V4 => 9,
        Family::V6 => 6,
    };
    packet[protocol_at] == PROTO_TCP
}

/// Turns the IP packet behind a frame's Ethernet header, as smoltcp wrote it, into a frame for the
/// guest.
fn finish(frame: &mut [u8], peer: &Peer, show: Window) -> (Offload, Option<Shown>) {
    let family = family_of(&frame[ETH_HEADER_LEN..]);
    let ethertype = match family {
        Family::V4 => ETHERTYPE_IPV4,
        Family::V6 => ETHERTYPE_IPV6,
    };
    wire::write_ethernet(frame, peer.guest, peer.gateway, ethertype);
    let (ip, tcp) = frame[ETH_HEADER_LEN..].split_at_mut(ip_header_len(family));
    let addresses = match family {
        Family::V4 => {
            let sum = !checksum::fold(checksum::sum(ip) - u64::from(be16(ip, 10)));
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            &ip[12..20]
        }
        Family::V6 => &ip[8..40],
    };
    let pseudo = checksum::sum(addresses) + u64::from(PROTO_TCP) + tcp.len() as u64;
    tcp[16..18].copy_from_slice(&checksum::fold(pseudo).to_be_bytes());

    let header_len = usize::from(tcp[12] >> 4) * 4;
    let flags = tcp[13];
    let acknowledged = be32(tcp, 8);
    let window = u32::from(be16(tcp, 14));
    let mut shift = show.shift;
    if flags & Tcp::SYN != 0 {
        shift = show_our_mss(&mut tcp[TCP_HEADER_LEN..header_len], peer.our_mss);
    }
    // The window of a SYN is never scaled (RFC 7323 2.2).
    let scale = if flags & Tcp::SYN != 0 { 0 } else { shift };
    let bounded = show.bound(window, scale, acknowledged);
    // The checksum is still to come.
    tcp[14..16].copy_from_slice(&(bounded as u16).to_be_bytes());
    let scaled = bounded << scale;
    let sequence = be32(tcp, 4);
    let shown = (flags & Tcp::RST == 0).then(|| Shown {
        sequence,
        end: sequence.wrapping_add((tcp.len() - header_len) as u32),
        acknowledged,
        edge: acknowledged.wrapping_add(scaled),
        window_shift: shift,
        is_bounded: bounded < window,
    });
    let gso = if tcp.len() - header_len > usize::from(peer.mss) {
        match family {
            Family::V4 => Gso::Tcp4(peer.mss),
            Family::V6 => Gso::Tcp6(peer.mss),
        }
    } else {
        Gso::None
    };
    let start = (ETH_HEADER_LEN + ip_header_len(family)) as u16;
    (
        Offload {
            csum: Csum::Partial { start, offset: 16 },
            gso,
            ecn: false,
        },
        shown,
    )
}

/// Puts our MSS into a SYN-ACK's options; returns the window scale they offer.
fn show_our_mss(options: &mut [u8], mss: u16) -> u8 {
    let mut at = 0;
    let mut shift = 0;
    while at + 1 < options.len() {
        match (options[at], usize::from(options[at + 1])) {
            (0, _) => break,
            (1, _) => {
                at += 1;
                continue;
            }
            (2, 4) => options[at + 2..at + 4].copy_from_slice(&mss.to_be_bytes()),
            (3, 3) => shift = options[at + 2],
            _ => {}
        }
        at += usize::from(options[at + 1]).max(2);
    }
    shift
}

/// Tells smoltcp what it runs on, where no packet moves.
struct Capabilities;

impl phy::Device for Capabilities {
    type RxToken<'b> = RxToken<'b>;
    type TxToken<'b> = TxToken<'b, NoReply>;

    fn receive(&mut self, _now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        None
    }

    fn transmit(&mut self, _now: Instant) -> Option<Self::TxToken<'_>> {
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities()
    }
}

/// The outbox of [`Capabilities`], which never gives a token.
pub struct NoReply;

impl Outbox for NoReply {
    fn buffer(&mut self) -> &mut [u8] {
        &mut []
    }

    fn send(&mut self, _len: usize, _offload: Offload) {}
}
