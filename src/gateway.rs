//! The gateway: the LAN's .1 as a port of the switch.
//!
//! A service says what it claims and what it answers; the registry asks them in order, what none
//! claims goes to the NAT. Answers leave through an [`Outbox`], which re-enters the switch as
//! ingress of [`crate::frame::PortId::GATEWAY`].

use std::net::Ipv4Addr;

use crate::frame::{Instant, Mac};
use crate::offload::Offload;
use crate::stats::DropReason;
use crate::wire::Packet;

/// The addresses the gateway's services answer with.
#[derive(Clone, Debug)]
pub struct LanConfig {
    /// The gateway's MAC.
    pub mac: Mac,
    /// The gateway's address (192.168.122.1).
    pub address: Ipv4Addr,
    /// Prefix length of the LAN, 8..=30.
    pub prefix: u8,
    /// MTU announced to guests, bytes of IP packet.
    pub mtu: u16,
}

impl LanConfig {
    /// Network mask.
    pub fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(self.prefix)))
    }

    /// First address of the subnet.
    pub fn network(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() & self.mask().to_bits())
    }

    /// Directed broadcast address of the subnet.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | !self.mask().to_bits())
    }

    /// Whether `address` is of this LAN.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask().to_bits() == self.network().to_bits()
    }
}

/// Where the gateway and the NAT put the frames they make. One frame at a time: write it into
/// [`Outbox::buffer`], then [`Outbox::send`] it; it is switched and written before `send` returns,
/// so the buffer stays in cache and nothing queues.
pub trait Outbox {
    /// At least [`crate::frame::FRAME_BUFFER_LEN`] bytes; the frame starts at byte 0.
    fn buffer(&mut self) -> &mut [u8];

    /// Sends the first `len` bytes of the buffer as one Ethernet frame.
    fn send(&mut self, len: usize, offload: Offload);
}

/// What a service did with a packet it claimed.
pub type Handled = Result<(), DropReason>;

/// A gateway service: pure, with its time passed in.
pub trait Service {
    /// Name for counters and `lanlet status`.
    fn name(&self) -> &'static str;

    /// Whether the packet is for this service. Called for every packet that reaches the gateway;
    /// cheap, and true only on certainty.
    fn claims(&self, packet: &Packet<'_>) -> bool;

    /// Answers a claimed packet.
    ///
    /// # Errors
    /// The reason to count the packet as dropped for.
    fn handle(&mut self, packet: &Packet<'_>, now: Instant, out: &mut dyn Outbox) -> Handled;
}
