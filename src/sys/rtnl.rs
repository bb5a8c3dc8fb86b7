//! The rtnetlink requests lanlet makes: links, addresses, routes, and the tc redirect of the wire.

use std::net::{Ipv4Addr, Ipv6Addr};

use rustix::io::Errno;

use super::netlink::{Message, NetlinkError, RouteSocket, attributes, u32_at, u64_at};
use crate::frame::Mac;

/// Set-up requests are acknowledged; a second one for the same thing is refused.
const CREATE: i32 = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;

// linux/if_link.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_TXQLEN: u16 = 13;
const IFLA_STATS64: u16 = 23;
// linux/if_addr.h
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
// linux/rtnetlink.h
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_DST: u16 = 1;
const RTA_EXPIRES: u16 = 23;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
// linux/pkt_sched.h
const TC_H_ROOT: u32 = 0xffff_ffff;
const TC_H_CLSACT: u32 = 0xffff_fff1;
const TC_H_CLSACT_HANDLE: u32 = 0xffff_0000;
/// TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)
const TC_H_CLSACT_INGRESS: u32 = 0xffff_fff2;
// linux/pkt_cls.h, linux/tc_act/tc_mirred.h
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: i32 = 1;
const TC_ACT_STOLEN: i32 = 4;
const TC_U32_TERMINAL: u8 = 1;

/// What to change of a link; `None` leaves it.
#[derive(Clone, Copy, Default, Debug)]
pub struct LinkChange {
    /// IFF_UP.
    pub up: Option<bool>,
    /// IFF_NOARP: the kernel neither asks nor answers.
    pub no_arp: Option<bool>,
    /// MTU.
    pub mtu: Option<u32>,
    /// Entries of the transmit queue. A tap's queue takes it when the link comes up or it changes.
    pub tx_queue_len: Option<u32>,
    /// MAC address.
    pub mac: Option<Mac>,
}

/// A link's state.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Link {
    /// Index in its namespace.
    pub index: u32,
    /// IFF_UP.
    pub up: bool,
    /// MTU.
    pub mtu: u32,
    /// Entries of the transmit queue.
    pub tx_queue_len: u32,
    /// Frames its user wrote that the kernel dropped.
    pub rx_dropped: u64,
    /// Frames dropped before its user read them.
    pub tx_dropped: u64,
    /// Frames its user wrote.
    pub rx_packets: u64,
    /// Frames its user read.
    pub tx_packets: u64,
}

impl RouteSocket {
    /// The link named `name`.
    ///
    /// # Errors
    /// ENODEV when there is none.
    pub fn link(&mut self, name: &str) -> Result<Link, NetlinkError> {
        let mut message = link_message(libc::RTM_GETLINK, 0, 0, 0, 0);
        message.attribute(IFLA_IFNAME, &nul_terminated(name));
        let answer = self.request(message)?.ok_or(Errno::BADMSG)?;
        Ok(parse_link(&answer).ok_or(Errno::BADMSG)?)
    }

    /// Changes the link `index`.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn link_set(&mut self, index: u32, change: LinkChange) -> Result<(), NetlinkError> {
        let mut flags = 0;
        let mut mask = 0;
        for (wanted, flag) in [(change.up, libc::IFF_UP), (change.no_arp, libc::IFF_NOARP)] {
            mask |= if wanted.is_some() { flag } else { 0 };
            flags |= if wanted == Some(true) { flag } else { 0 };
        }
        let ack = libc::NLM_F_ACK;
        let mut message = link_message(libc::RTM_NEWLINK, ack, index, flags as u32, mask as u32);
        for (value, kind) in [(change.mtu, IFLA_MTU), (change.tx_queue_len, IFLA_TXQLEN)] {
            if let Some(value) = value {
                message.attribute(kind, &value.to_ne_bytes());
            }
        }
        if let Some(mac) = change.mac {
            message.attribute(IFLA_ADDRESS, &mac.0);
        }
        self.request(message).map(drop)
    }

    /// Adds an address, with the route to its subnet.
    ///
    /// # Errors
    /// EEXIST when it is there.
    pub fn address_add(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<(), NetlinkError> {
        let mut message = Message::new(libc::RTM_NEWADDR, CREATE);
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        message
            .put(&[libc::AF_INET as u8, prefix, 0, libc::RT_SCOPE_UNIVERSE])
            .put(&index.to_ne_bytes())
            .attribute(IFA_LOCAL, &address.octets())
            .attribute(IFA_ADDRESS, &address.octets());
        self.request(message).map(drop)
    }

    /// Adds the default route by `gateway`.
    ///
    /// # Errors
    /// ENETUNREACH when the gateway is on no subnet of the link, EEXIST when there is one.
    pub fn default_route_add(&mut self, index: u32, gateway: Ipv4Addr) -> Result<(), NetlinkError> {
        let mut message = Message::new(libc::RTM_NEWROUTE, CREATE);
        // struct rtmsg: family, destination and source length, tos; table, protocol, scope, type;
        // flags.
        message
            .put(&[libc::AF_INET as u8, 0, 0, 0])
            .put(&[
                libc::RT_TABLE_MAIN,
                libc::RTPROT_BOOT,
                libc::RT_SCOPE_UNIVERSE,
                libc::RTN_UNICAST,
            ])
            .put(&0u32.to_ne_bytes())
            .attribute(RTA_GATEWAY, &gateway.octets())
            .attribute(RTA_OIF, &index.to_ne_bytes());
        self.request(message).map(drop)
    }

    /// Adds an IPv6 address, for use at once: without duplicate address detection. One that is there (a
    /// router advertisement may have been quicker) is taken over.
    ///
    /// # Errors
    /// EOPNOTSUPP or EACCES where IPv6 is off.
    pub fn address_add6(
        &mut self,
        index: u32,
        address: Ipv6Addr,
        prefix: u8,
    ) -> Result<(), NetlinkError> {
        let replace = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        let mut message = Message::new(libc::RTM_NEWADDR, replace);
        let flags = libc::IFA_F_NODAD as u8;
        message
            .put(&[libc::AF_INET6 as u8, prefix, flags, libc::RT_SCOPE_UNIVERSE])
            .put(&index.to_ne_bytes())
            .attribute(IFA_ADDRESS, &address.octets());
        self.request(message).map(drop)
    }

    /// Adds an IPv6 route to a network (`::/0` for all) by a gateway on a link, which goes after
    /// `expires_secs`. The higher of two
    /// metrics yields; those of router advertisements have 1,024.
    ///
    /// # Errors
    /// As [`RouteSocket::default_route_add`].
    pub fn route_add6(
        &mut self,
        (index, gateway): (u32, Ipv6Addr),
        (network, prefix): (Ipv6Addr, u8),
        metric: u32,
        expires_secs: u32,
    ) -> Result<(), NetlinkError> {
        let mut message = Message::new(libc::RTM_NEWROUTE, CREATE);
        message
            .put(&[libc::AF_INET6 as u8, prefix, 0, 0])
            .put(&[
                libc::RT_TABLE_MAIN,
                libc::RTPROT_BOOT,
                libc::RT_SCOPE_UNIVERSE,
                libc::RTN_UNICAST,
            ])
            .put(&0u32.to_ne_bytes())
            .attribute(RTA_DST, &network.octets())
            .attribute(RTA_GATEWAY, &gateway.octets())
            .attribute(RTA_OIF, &index.to_ne_bytes())
            .attribute(RTA_PRIORITY, &metric.to_ne_bytes())
            .attribute(RTA_EXPIRES, &expires_secs.to_ne_bytes());
        self.request(message).map(drop)
    }

    /// Takes the queueing discipline off a link: a full tap queue is then told to the sender, and
    /// no second queue stands before it.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn qdisc_none(&mut self, index: u32) -> Result<(), NetlinkError> {
        let flags = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        let mut message = tc_message(libc::RTM_NEWQDISC, flags, index, 0, TC_H_ROOT, 0);
        message.attribute(TCA_KIND, b"noqueue\0");
        self.request(message).map(drop)
    }

    /// Adds the place where [`RouteSocket::redirect_ingress`] filters.
    ///
    /// # Errors
    /// ENOENT where the kernel lacks NET_SCH_INGRESS.
    pub fn clsact_add(&mut self, index: u32) -> Result<(), NetlinkError> {
        let kind = libc::RTM_NEWQDISC;
        let mut message = tc_message(kind, CREATE, index, TC_H_CLSACT_HANDLE, TC_H_CLSACT, 0);
        message.attribute(TCA_KIND, b"clsact\0");
        self.request(message).map(drop)
    }

    /// Sends everything that enters by link `from` out by link `to`.
    ///
    /// # Errors
    /// Where the kernel lacks act_mirred, or both of cls_matchall and cls_u32.
    pub fn redirect_ingress(&mut self, from: u32, to: u32) -> Result<(), NetlinkError> {
        self.request(matchall(from, to))
            .or_else(|_| self.request(catch_all_u32(from, to)))
            .map(drop)
    }
}

/// The name and index in an RTM_NEWLINK or RTM_DELLINK body.
pub fn parse_link(body: &[u8]) -> Option<Link> {
    // struct ifinfomsg: family, padding, type (u16), index, flags, change mask.
    let flags = u32_at(body, 8)?;
    let mut link = Link {
        index: u32_at(body, 4)?,
        up: flags & libc::IFF_UP as u32 != 0,
        ..Link::default()
    };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            IFLA_MTU => link.mtu = u32_at(value, 0)?,
            IFLA_TXQLEN => link.tx_queue_len = u32_at(value, 0)?,
            IFLA_STATS64 => {
                // struct rtnl_link_stats64: rx/tx packets, bytes, errors, dropped.
                link.rx_packets = u64_at(value, 0)?;
                link.tx_packets = u64_at(value, 8)?;
                link.rx_dropped = u64_at(value, 48)?;
                link.tx_dropped = u64_at(value, 56)?;
            }
            _ => {}
        }
    }
    Some(link)
}

fn link_message(kind: u16, message_flags: i32, index: u32, flags: u32, mask: u32) -> Message {
    let mut message = Message::new(kind, message_flags);
    message
        .put(&[libc::AF_UNSPEC as u8, 0, 0, 0])
        .put(&index.to_ne_bytes())
        .put(&flags.to_ne_bytes())
        .put(&mask.to_ne_bytes());
    message
}

/// `struct tcmsg`.
fn tc_message(kind: u16, flags: i32, index: u32, handle: u32, parent: u32, info: u32) -> Message {
    let mut message = Message::new(kind, flags);
    message.put(&[libc::AF_UNSPEC as u8, 0, 0, 0]);
    for word in [index, handle, parent, info] {
        message.put(&word.to_ne_bytes());
    }
    message
}

fn filter_message(from: u32) -> Message {
    // Priority 1, any protocol.
    let info = 1 << 16 | u32::from((libc::ETH_P_ALL as u16).to_be());
    tc_message(
        libc::RTM_NEWTFILTER,
        CREATE,
        from,
        0,
        TC_H_CLSACT_INGRESS,
        info,
    )
}

fn matchall(from: u32, to: u32) -> Message {
    let mut message = filter_message(from);
    message
        .attribute(TCA_KIND, b"matchall\0")
        .nest(TCA_OPTIONS, |options| {
            options.nest(TCA_MATCHALL_ACT, |actions| redirect_action(actions, to));
        });
    message
}

/// `u32` without keys matches everything. A key, even an empty one, would have to lie inside the
/// frame, and shorter frames would fall through to the kernel's own stack.
fn catch_all_u32(from: u32, to: u32) -> Message {
    let mut message = filter_message(from);
    message
        .attribute(TCA_KIND, b"u32\0")
        .nest(TCA_OPTIONS, |options| {
            // struct tc_u32_sel: flags, offshift, nkeys, padding, and offsets that stay 0.
            options.attribute(
                TCA_U32_SEL,
                &[TC_U32_TERMINAL, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            );
            options.nest(TCA_U32_ACT, |actions| redirect_action(actions, to));
        });
    message
}

fn redirect_action(actions: &mut Message, to: u32) {
    const FIRST: u16 = 1;
    actions.nest(FIRST, |action| {
        action
            .attribute(TCA_ACT_KIND, b"mirred\0")
            .nest(TCA_ACT_OPTIONS, |options| {
                options.nest(TCA_MIRRED_PARMS, |parameters| {
                    // struct tc_mirred: index, capabilities, action, reference counts; then eaction
                    // and the link.
                    for word in [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR] {
                        parameters.put(&word.to_ne_bytes());
                    }
                    parameters.put(&to.to_ne_bytes());
                });
            });
    });
}

fn nul_terminated(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}
