//! Whether an address is the host's own, asked of the kernel's routing table.
//!
//! RTM_GETROUTE answers for the whole table in one system call each way (3 microseconds), for
//! secondary addresses and `local` prefixes too. Connecting a UDP socket and comparing its own address
//! does not: for a secondary address the kernel picks the primary one as source.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// linux/rtnetlink.h: RTM_NEWROUTE, RTM_GETROUTE, RTN_LOCAL, RTA_DST.
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTN_LOCAL: u8 = 2;
const RTA_DST: u16 = 1;
/// linux/netlink.h: NLM_F_REQUEST, NLMSG_ERROR.
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const AF_INET: u8 = 2;

/// nlmsghdr (16), rtmsg (12), one attribute (4 + 4).
const QUERY_LEN: usize = 36;
/// Offset of rtm_type: seven bytes into rtmsg.
const TYPE_AT: usize = 16 + 7;
/// Replies read at most to find the one to our query; more can only be left-overs of failed reads.
const REPLIES_MAX: usize = 8;

/// A netlink socket kept for questions.
#[derive(Debug)]
pub struct RouteTable {
    socket: OwnedFd,
    sequence: u32,
}

impl RouteTable {
    /// Opens the socket.
    ///
    /// # Errors
    /// No netlink (a seccomp filter), or no fd left.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Whether packets to `address` end at the host itself. No route to it: no. No answer from the
    /// kernel: yes, as guests are kept away from the host.
    pub fn is_local(&mut self, address: Ipv4Addr) -> bool {
        self.ask(address).unwrap_or(true)
    }

    fn ask(&mut self, address: Ipv4Addr) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let query = query(address, self.sequence);
        send(&self.socket, &query, SendFlags::DONTWAIT)?;
        // The kernel answers before send returns.
        let mut reply = [0u8; 1024];
        for _ in 0..REPLIES_MAX {
            let (len, _) = recv(&self.socket, &mut reply, RecvFlags::DONTWAIT)?;
            if let Some(local) = decide(&reply[..len], self.sequence) {
                return Ok(local);
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

fn query(address: Ipv4Addr, sequence: u32) -> [u8; QUERY_LEN] {
    let mut query = [0; QUERY_LEN];
    query[..4].copy_from_slice(&(QUERY_LEN as u32).to_ne_bytes());
    query[4..6].copy_from_slice(&RTM_GETROUTE.to_ne_bytes());
    query[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    query[8..12].copy_from_slice(&sequence.to_ne_bytes());
    query[16] = AF_INET;
    query[17] = 32;
    query[28..30].copy_from_slice(&8u16.to_ne_bytes());
    query[30..32].copy_from_slice(&RTA_DST.to_ne_bytes());
    query[32..36].copy_from_slice(&address.octets());
    query
}

/// The answer, if `reply` is the one to `sequence`.
fn decide(reply: &[u8], sequence: u32) -> Option<bool> {
    let kind = u16::from_ne_bytes(reply.get(4..6)?.try_into().ok()?);
    if reply.get(8..12)? != sequence.to_ne_bytes() {
        return None;
    }
    match kind {
        RTM_NEWROUTE => Some(*reply.get(TYPE_AT)? == RTN_LOCAL),
        // Unreachable, prohibited, blackholed: wherever packets go, it is not the host.
        NLMSG_ERROR => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_host() {
        let mut table = RouteTable::open().unwrap();
        for local in [[127, 0, 0, 1], [127, 200, 3, 4]] {
            assert!(table.is_local(local.into()), "{local:?}");
        }
        for foreign in [[192, 0, 2, 1], [203, 0, 113, 9], [255, 255, 255, 255]] {
            assert!(!table.is_local(foreign.into()), "{foreign:?}");
        }
    }

    #[test]
    fn other_replies_are_passed_over() {
        let mut reply = query(Ipv4Addr::LOCALHOST, 7);
        reply[4..6].copy_from_slice(&RTM_NEWROUTE.to_ne_bytes());
        assert_eq!(decide(&reply, 7), Some(false));
        reply[TYPE_AT] = RTN_LOCAL;
        assert_eq!(decide(&reply, 7), Some(true));
        assert_eq!(decide(&reply, 8), None);
        for len in 0..TYPE_AT {
            assert_eq!(decide(&reply[..len], 7), None);
        }
    }
}
