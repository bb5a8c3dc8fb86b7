//! Neighbor Discovery messages (RFC 4861 4): the checks of what guests send, and the frames of what
//! the gateway sends.

use std::net::Ipv6Addr;

use crate::frame::{ETH_HEADER_LEN, Mac};
use crate::stats::DropReason;
use crate::wire::ipv6::{
    IPV6_HEADER_LEN, Ipv6Fields, address_at, group_mac, solicited_node, write_ipv6,
};
use crate::wire::{ETHERTYPE_IPV6, Ipv6, PROTO_ICMPV6, checksum, write_ethernet};

/// ICMPv6 types of Neighbor Discovery (RFC 4861 4.1 to 4.5).
pub const ROUTER_SOLICITATION: u8 = 133;
pub const ROUTER_ADVERTISEMENT: u8 = 134;
pub const NEIGHBOR_SOLICITATION: u8 = 135;
pub const NEIGHBOR_ADVERTISEMENT: u8 = 136;
pub const REDIRECT: u8 = 137;

/// Options (RFC 4861 4.6, RFC 4191 2.3, RFC 8106 5).
pub const SOURCE_LINK_LAYER: u8 = 1;
pub const TARGET_LINK_LAYER: u8 = 2;
pub const PREFIX_INFORMATION: u8 = 3;
pub const MTU: u8 = 5;
pub const ROUTE_INFORMATION: u8 = 24;
pub const RDNSS: u8 = 25;
pub const DNSSL: u8 = 31;

/// What every Neighbor Discovery packet is sent with, and no router on the way can restore: who
/// receives it knows that the sender is on the link (RFC 4861 6.1, 7.1).
pub const HOP_LIMIT: u8 = 255;
/// All nodes of the link (RFC 4291 2.7.1).
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// All routers of the link.
pub const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// Where the ICMPv6 message begins in a frame that [`finish`] completes.
pub const MESSAGE_AT: usize = ETH_HEADER_LEN + IPV6_HEADER_LEN;

/// Header of a solicitation or advertisement of a neighbor, with its target.
const NEIGHBOR_LEN: usize = 24;
/// A link-layer address option with an Ethernet address.
const LINK_LAYER_LEN: usize = 8;
/// Flags of a neighbor advertisement (RFC 4861 4.4).
const ROUTER: u8 = 0x80;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

/// A message that passed the checks of its kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message {
    /// "Are there routers?"
    RouterSolicitation,
    /// "Who has this address?"; from the unspecified address: "Has anybody?" (RFC 4862 5.4).
    NeighborSolicitation { target: Ipv6Addr },
    /// "I have this address."
    NeighborAdvertisement { target: Ipv6Addr },
    /// What only routers send: an advertisement or a redirect.
    FromRouter,
}

/// Whether an ICMPv6 message is of Neighbor Discovery.
pub fn is_discovery(message: &[u8]) -> bool {
    message
        .first()
        .is_some_and(|kind| (ROUTER_SOLICITATION..=REDIRECT).contains(kind))
}

/// Checks a message, whose ICMPv6 checksum was checked, as RFC 4861 6.1.1, 7.1.1 and 7.1.2 have it.
///
/// # Errors
/// [`DropReason::Malformed`]: to be discarded without an answer.
pub fn parse(ip: &Ipv6<'_>, message: &[u8]) -> Result<Message, DropReason> {
    let &[kind, code, ..] = message else {
        return Err(DropReason::Malformed);
    };
    let sane = ip.ttl == HOP_LIMIT && code == 0;
    let options_at = match kind {
        ROUTER_SOLICITATION => 8,
        NEIGHBOR_SOLICITATION | NEIGHBOR_ADVERTISEMENT => NEIGHBOR_LEN,
        // Not believed, whatever they say.
        ROUTER_ADVERTISEMENT | REDIRECT if sane => return Ok(Message::FromRouter),
        _ => return Err(DropReason::Malformed),
    };
    let options = message.get(options_at..).ok_or(DropReason::Malformed)?;
    let names_source = has_option(options, SOURCE_LINK_LAYER)?;
    let anonymous = ip.source.is_unspecified();
    if !sane || (anonymous && names_source) || ip.source.is_multicast() {
        return Err(DropReason::Malformed);
    }
    if kind == ROUTER_SOLICITATION {
        return Ok(Message::RouterSolicitation);
    }
    let target = address_at(message, 8);
    let to_group = ip.destination.is_multicast();
    let wrong = target.is_multicast()
        || match kind {
            NEIGHBOR_SOLICITATION => anonymous && !is_solicited_node(ip.destination),
            _ => anonymous || (to_group && message[4] & SOLICITED != 0),
        };
    match (wrong, kind) {
        (true, _) => Err(DropReason::Malformed),
        (false, NEIGHBOR_SOLICITATION) => Ok(Message::NeighborSolicitation { target }),
        (false, _) => Ok(Message::NeighborAdvertisement { target }),
    }
}

/// Whether `options` hold one of this kind. All of them must have a length, and lie inside.
fn has_option(mut options: &[u8], wanted: u8) -> Result<bool, DropReason> {
    let mut found = false;
    while let [kind, len, ..] = *options {
        let len = usize::from(len) * 8;
        if len == 0 || len > options.len() {
            return Err(DropReason::Malformed);
        }
        found |= kind == wanted;
        options = &options[len..];
    }
    if options.is_empty() {
        Ok(found)
    } else {
        Err(DropReason::Malformed)
    }
}

/// ff02::1:ff00:0/104 (RFC 4291 2.7.1).
fn is_solicited_node(address: Ipv6Addr) -> bool {
    address == solicited_node(address)
}

/// Writes a neighbor advertisement of `target` for `mac` to [`MESSAGE_AT`]: solicited, or on its own.
/// It overrides what others have said. Returns the message's length.
pub fn write_advertisement(
    buffer: &mut [u8],
    target: Ipv6Addr,
    mac: Mac,
    solicited: bool,
) -> usize {
    const LEN: usize = NEIGHBOR_LEN + LINK_LAYER_LEN;
    let message = &mut buffer[MESSAGE_AT..][..LEN];
    message.fill(0);
    message[0] = NEIGHBOR_ADVERTISEMENT;
    message[4] = ROUTER | OVERRIDE | if solicited { SOLICITED } else { 0 };
    message[8..24].copy_from_slice(&target.octets());
    message[24..].copy_from_slice(&link_layer(TARGET_LINK_LAYER, mac));
    LEN
}

/// Writes a neighbor solicitation of `target` by `mac` to [`MESSAGE_AT`]. Returns the message's length.
pub fn write_solicitation(buffer: &mut [u8], target: Ipv6Addr, mac: Mac) -> usize {
    const LEN: usize = NEIGHBOR_LEN + LINK_LAYER_LEN;
    let message = &mut buffer[MESSAGE_AT..][..LEN];
    message.fill(0);
    message[0] = NEIGHBOR_SOLICITATION;
    message[8..24].copy_from_slice(&target.octets());
    message[24..].copy_from_slice(&link_layer(SOURCE_LINK_LAYER, mac));
    LEN
}

/// A link-layer address option (RFC 4861 4.6.1).
pub fn link_layer(kind: u8, mac: Mac) -> [u8; LINK_LAYER_LEN] {
    let [a, b, c, d, e, f] = mac.0;
    [kind, 1, a, b, c, d, e, f]
}

/// Completes the frame around a message of `len` bytes at [`MESSAGE_AT`]; a group's packet goes to
/// the group's MAC. Returns the frame's length.
pub fn finish(
    buffer: &mut [u8],
    (mac, source): (Mac, Ipv6Addr),
    (to_mac, destination): (Mac, Ipv6Addr),
    len: usize,
) -> usize {
    let to_mac = match destination.is_multicast() {
        true => group_mac(destination),
        false => to_mac,
    };
    write_ethernet(buffer, to_mac, mac, ETHERTYPE_IPV6);
    let fields = Ipv6Fields {
        source,
        destination,
        protocol: PROTO_ICMPV6,
        hop_limit: HOP_LIMIT,
        traffic_class: 0,
    };
    write_ipv6(buffer, fields, len);
    let message = &mut buffer[MESSAGE_AT..][..len];
    message[2..4].fill(0);
    let sum = !checksum::transport(source.into(), destination.into(), PROTO_ICMPV6, message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    MESSAGE_AT + len
}
