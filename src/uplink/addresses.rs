//! Hears when the host loses an address (connections from it can't live on) or gets one (guests that
//! wrote there wrote to the outside before).

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, BorrowedFd};

use crate::sys::netlink::{RouteSocket, attributes};
use crate::wire::ipv6::address_at;

/// linux/rtnetlink.h.
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
/// linux/if_addr.h: ifaddrmsg, IFA_ADDRESS, IFA_LOCAL.
const IFADDRMSG_LEN: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// What happened to an address of the host's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// It is there, or its lifetime changed.
    Gained(IpAddr),
    /// It is gone.
    Lost(IpAddr),
}

/// A subscription to the host's address changes.
#[derive(Debug)]
pub struct AddressWatch(RouteSocket);

impl AddressWatch {
    /// Subscribes.
    ///
    /// # Errors
    /// No netlink (a seccomp filter), or no fd left.
    pub fn open() -> io::Result<Self> {
        let groups = libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;
        RouteSocket::open(groups as u32).map(Self)
    }

    /// Tells `sink` of each change. `false`: notices were lost, any address may have come or gone.
    pub fn poll(&self, sink: &mut dyn FnMut(Change)) -> bool {
        loop {
            match self.0.notification() {
                Ok(messages) => messages
                    .iter()
                    .filter_map(|(kind, body)| change(*kind, body))
                    .for_each(&mut *sink),
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }
}

impl AsFd for AddressWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn change(kind: u16, body: &[u8]) -> Option<Change> {
    match kind {
        RTM_NEWADDR => address(body).map(Change::Gained),
        RTM_DELADDR => address(body).map(Change::Lost),
        _ => None,
    }
}

/// The host's own address that an ifaddrmsg is about: IFA_LOCAL where there is one (IFA_ADDRESS is
/// then a point-to-point link's other end).
fn address(body: &[u8]) -> Option<IpAddr> {
    let read = |wanted| {
        let found = attributes(body.get(IFADDRMSG_LEN..)?).find(|(kind, _)| *kind == wanted)?;
        match found.1 {
            [a, b, c, d] => Some(IpAddr::from(Ipv4Addr::new(*a, *b, *c, *d))),
            value if value.len() == 16 => Some(address_at(value, 0).into()),
            _ => None,
        }
    };
    read(IFA_LOCAL).or_else(|| read(IFA_ADDRESS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_local_address_counts() {
        let mut body = vec![2, 24, 0, 0, 1, 0, 0, 0];
        body.extend_from_slice(&[8, 0, 1, 0, 10, 0, 0, 2]);
        assert_eq!(address(&body), Some("10.0.0.2".parse().unwrap()));
        body.extend_from_slice(&[8, 0, 2, 0, 10, 0, 0, 1]);
        assert_eq!(address(&body), Some("10.0.0.1".parse().unwrap()));
        assert_eq!(address(&body[..4]), None);
        assert_eq!(address(&[]), None);
        let mut body = vec![10, 64, 0, 0, 1, 0, 0, 0];
        body.extend_from_slice(&[20, 0, 1, 0]);
        body.extend_from_slice(&[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
        assert_eq!(address(&body), Some("2001:db8::5".parse().unwrap()));
    }

    #[test]
    fn nothing_is_told_while_nothing_changes() {
        let watch = AddressWatch::open().unwrap();
        assert!(watch.poll(&mut |change| panic!("{change:?}")));
    }
}
