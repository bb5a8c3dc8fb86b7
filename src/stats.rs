//! Counters of the data path and the reasons a frame is dropped for.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a frame went no further. Every frame that leaves no other way is counted under one.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum DropReason { $($(#[$doc])* $variant,)* }

        impl DropReason {
            /// All reasons, in counter order.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)*];

            /// The name shown by `lanlet status`.
            pub fn name(self) -> &'static str {
                match self { $(DropReason::$variant => $name,)* }
            }
        }
    };
}

drop_reasons! {
    /// Shorter than an Ethernet header, or than a header it claims to hold.
    Truncated = "truncated",
    /// Longer than [`crate::frame::FRAME_LEN_MAX`].
    Oversized = "oversized",
    /// The virtio-net header contradicts the frame.
    BadOffload = "bad_offload",
    /// A header field that no correct sender writes (length, version, checksum).
    Malformed = "malformed",
    /// The source is a group address (IEEE 802.1Q 8.8.1 forbids learning it).
    GroupSource = "group_source",
    /// The source is the gateway's own MAC.
    GatewaySource = "gateway_source",
    /// Destination 01-80-C2-00-00-0x, which no bridge forwards (IEEE 802.1Q table 8-1).
    Reserved = "reserved",
    /// The destination is behind the port the frame came from.
    SamePort = "same_port",
    /// A flood that found no other port, or a frame whose own port was removed before the gateway had it.
    NoPort = "no_port",
    /// The egress port's kernel queue took no more.
    EgressFull = "egress_full",
    /// The egress port refused the frame.
    EgressError = "egress_error",
    /// The guest behind the egress port has its link down. Floods leave such a port out.
    LinkDown = "link_down",
    /// The frame does not fit the egress port and can't be segmented.
    EgressTooBig = "egress_too_big",
    /// For the gateway, but the worker with the port's flows is too far behind.
    HomeBusy = "home_busy",
    /// Counted as sent, but it waited in vain: the vhost-user guest went, or its buffers are too small.
    Abandoned = "abandoned",
    /// The egress port is a vhost-user one without a front-end, or whose guest's driver is not up.
    Unconnected = "unconnected",
    /// For the gateway's MAC, but no service and no NAT rule wants it.
    Unclaimed = "unclaimed",
    /// A fragment that overlaps or contradicts others of its datagram.
    Fragment = "fragment",
    /// An IP protocol other than TCP, UDP and ICMP.
    Protocol = "protocol",
    /// A source address that is not of this LAN.
    ForeignSource = "foreign_source",
    /// A destination guests may not reach: the host itself, loopback, group or reserved addresses.
    ForbiddenDestination = "forbidden_destination",
    /// Denied by the egress policy, without an answer.
    SilentlyDenied = "silently_denied",
    /// TTL ran out at the gateway (answered with ICMP time exceeded).
    TtlExceeded = "ttl_exceeded",
    /// No flow and not the start of one.
    NoFlow = "no_flow",
    /// A flow, mapping or query limit is reached.
    Limit = "limit",
    /// No open file is left for another host socket (RLIMIT_NOFILE), and nothing idle to give up.
    OutOfFiles = "out_of_files",
    /// No port of the host is free, toward that destination or at all (net.ipv4.ip_local_port_range).
    OutOfPorts = "out_of_ports",
    /// The host refused the operation (socket error, no ping sockets).
    HostRefused = "host_refused",
    /// The host's socket buffer is full.
    HostFull = "host_full",
    /// From an outside peer that the guest never wrote to.
    Filtered = "filtered",
    /// Bigger than the LAN's MTU, and fragmentation is not possible.
    TooBig = "too_big",
    /// A flow was ended because handling its packet failed inside the TCP stack.
    FlowFault = "flow_fault",
    /// ARP or NDP that claims a gateway address for another station (RFC 5227 2.4, RFC 4862 5.4).
    AddressConflict = "address_conflict",
    /// A router advertisement or redirect of a guest. It concerns the gateway alone: other guests got it.
    RogueRouter = "rogue_router",
    /// A hardware address inside a message (DHCP chaddr) that is not its sender's, or is that of a guest on
    /// another port.
    Spoofed = "spoofed",
    /// A DHCP message that came through a relay agent; this server has one link.
    Relayed = "relayed",
    /// DHCP RELEASE or DECLINE of an address that its sender has no lease for.
    NoLease = "no_lease",
}

/// Number of drop reasons.
pub const DROP_REASONS: usize = DropReason::ALL.len();

/// Counters of one port. Written with relaxed atomics by the worker, read by anyone.
#[derive(Debug)]
pub struct PortCounters {
    /// Frames received from the port.
    pub rx_frames: AtomicU64,
    /// Bytes received from the port.
    pub rx_bytes: AtomicU64,
    /// Frames received that went on ([`PortCounters::rx_joined`] did not) and were for the gateway.
    pub rx_gateway: AtomicU64,
    /// Frames received that went on as part of the one before them, or that a later acknowledgment made
    /// redundant ([`crate::offload::coalesce`]).
    pub rx_joined: AtomicU64,
    /// Frames sent to the port (a super-frame counts once).
    pub tx_frames: AtomicU64,
    /// Bytes sent to the port.
    pub tx_bytes: AtomicU64,
    /// Frames of this ingress port dropped, by reason. For egress reasons: of this egress port.
    pub drops: [AtomicU64; DROP_REASONS],
}

impl Default for PortCounters {
    fn default() -> Self {
        Self {
            rx_frames: AtomicU64::new(0),
            rx_bytes: AtomicU64::new(0),
            rx_gateway: AtomicU64::new(0),
            rx_joined: AtomicU64::new(0),
            tx_frames: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            drops: [const { AtomicU64::new(0) }; DROP_REASONS],
        }
    }
}

impl PortCounters {
    /// Counts one dropped frame.
    pub fn count_drop(&self, reason: DropReason) {
        self.drops[reason as usize].fetch_add(1, Relaxed);
    }

    /// Counts one frame received.
    pub fn rx(&self, bytes: usize) {
        self.rx_frames.fetch_add(1, Relaxed);
        self.rx_bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// Counts frames that did not go on by themselves.
    pub fn join(&self, frames: usize) {
        if frames > 0 {
            self.rx_joined.fetch_add(frames as u64, Relaxed);
        }
    }

    /// Counts one frame sent.
    pub fn tx(&self, bytes: usize) {
        self.tx_frames.fetch_add(1, Relaxed);
        self.tx_bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// The drops that happened, in counter order.
    pub fn dropped(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL
            .iter()
            .map(|&reason| (reason, self.drops[reason as usize].load(Relaxed)))
            .filter(|&(_, count)| count != 0)
    }
}
