//! Making wires inside the helper's namespace.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use super::{QUEUES_MAX, TX_QUEUE_LEN, TapError, WireKind, WireOptions};
use crate::port::KernelDrops;
use crate::sys::netlink::{NetlinkError, RouteSocket};
use crate::sys::rtnl::{Link, LinkChange};
use crate::sys::{packet_ring, tun};

/// What the helper remembers of a wire. It keeps no fd of it.
#[derive(Debug)]
pub(super) struct WireEnds {
    /// The VMM's tap.
    pub vm: Link,
    vm_ifname: String,
    /// The switch's tap; none with a packet socket.
    sw_ifname: Option<String>,
}

/// A wire's fds, to be passed on.
pub(super) struct Made {
    pub ends: WireEnds,
    pub kind: WireKind,
    pub vm_ifname: String,
    pub sw_ifname: String,
    /// The VMM's queues, then the switch's, then the netlink socket that was asked for.
    pub fds: Vec<OwnedFd>,
    /// How many are the VMM's.
    pub vm_queues: usize,
    pub uso: bool,
    /// Why it is no pair, where one was tried.
    pub fallback: Option<TapError>,
}

/// Makes wire number `id`: as a pair of taps if the kernel can, else with a packet socket.
pub(super) fn make(
    route: &mut RouteSocket,
    id: u64,
    options: WireOptions,
) -> Result<Made, TapError> {
    let WireOptions {
        mtu,
        queues,
        plain,
        kind,
        netlink,
    } = options;
    let vm_ifname = format!("vm{id}");
    let opened = if plain {
        tun::open_plain(&vm_ifname).map(|(fd, _)| vec![fd])
    } else {
        tun::open_queues(&vm_ifname, queues.clamp(1, QUEUES_MAX))
    };
    let mut fds = opened.map_err(|error| TapError::tap_open(&vm_ifname, &error))?;
    let vm = prepare(route, &vm_ifname, mtu)?;
    let sw_ifname = format!("sw{id}");
    let vm_queues = fds.len();
    let mut pair = || pair_end(route, vm, (&sw_ifname, vm_queues as u16), mtu);
    let (kind, (ends, uso), fallback) = match kind {
        Some(WireKind::Mirred) => (WireKind::Mirred, pair()?, None),
        Some(WireKind::Packet) => (WireKind::Packet, packet_end(vm)?, None),
        None => match pair() {
            Ok(end) => (WireKind::Mirred, end, None),
            Err(why) => (WireKind::Packet, packet_end(vm)?, Some(why)),
        },
    };
    fds.extend(ends);
    if netlink {
        let socket = RouteSocket::open(0).map_err(|error| TapError::tap("netlink", &error))?;
        fds.push(socket.into_fd());
    }
    let paired = kind == WireKind::Mirred;
    Ok(Made {
        ends: WireEnds {
            vm,
            vm_ifname: vm_ifname.clone(),
            sw_ifname: paired.then(|| sw_ifname.clone()),
        },
        kind,
        sw_ifname: if paired { sw_ifname } else { vm_ifname.clone() },
        vm_ifname,
        fds,
        vm_queues,
        uso,
        fallback,
    })
}

/// The switch's end as a second tap, with as many queues as the VMM's.
fn pair_end(
    route: &mut RouteSocket,
    vm: Link,
    (name, queues): (&str, u16),
    mtu: u32,
) -> Result<(Vec<OwnedFd>, bool), TapError> {
    let fds = tun::open_queues(name, queues).map_err(|error| TapError::tap_open(name, &error))?;
    let sw = prepare(route, name, mtu)?;
    let mut uso = true;
    for fd in &fds {
        let offloads = tun::enable_offloads(fd.as_fd());
        uso &= offloads.map_err(|error| TapError::tap(name, &error))?;
    }
    let mut join = || -> Result<(), NetlinkError> {
        route.clsact_add(vm.index)?;
        route.clsact_add(sw.index)?;
        route.redirect_ingress(vm.index, sw.index)?;
        route.redirect_ingress(sw.index, vm.index)
    };
    join().map_err(|error| {
        TapError::netlink(
            "joining two taps (needs NET_SCH_INGRESS, NET_ACT_MIRRED and NET_CLS_MATCHALL or \
             NET_CLS_U32)",
            &error,
        )
    })?;
    Ok((fds, uso))
}

/// The switch's end as a packet socket on the VMM's tap: one, however many queues the VMM has.
fn packet_end(vm: Link) -> Result<(Vec<OwnedFd>, bool), TapError> {
    let fd = packet_ring::open(vm.index).map_err(|error| TapError::tap("packet socket", &error))?;
    // What the driver knows, asked on a tap of its own: the VMM's is for the VMM to set.
    let probe = tun::open_vnet("probe%d", false)
        .and_then(|(probe, _)| tun::enable_offloads(probe.as_fd()))
        .unwrap_or(false);
    Ok((vec![fd], probe))
}

/// Makes a tap silent and brings it up.
fn prepare(route: &mut RouteSocket, name: &str, mtu: u32) -> Result<Link, TapError> {
    let mut set_up = || -> Result<Link, NetlinkError> {
        let link = route.link(name)?;
        let change = LinkChange {
            no_arp: Some(true),
            mtu: Some(mtu),
            tx_queue_len: Some(TX_QUEUE_LEN),
            ..LinkChange::default()
        };
        route.link_set(link.index, change)?;
        // Not vital: with the default discipline a full queue is counted, but not told to the
        // sender.
        let _ = route.qdisc_none(link.index);
        let up = LinkChange {
            up: Some(true),
            ..LinkChange::default()
        };
        route.link_set(link.index, up)?;
        route.link(name)
    };
    set_up().map_err(|error| TapError::netlink(format!("setting up {name}"), &error))
}

/// Takes a wire down. A VMM that still holds its end finds its link down: deleting its tap would
/// make QEMU spin on an fd in error.
pub(super) fn take_down(route: &mut RouteSocket, ends: &WireEnds) {
    let down = LinkChange {
        up: Some(false),
        ..LinkChange::default()
    };
    // It fails when the VMM went first, which is as good.
    let _ = route.link_set(ends.vm.index, down);
}

/// The kernel's drops on both taps.
pub(super) fn drops(route: &mut RouteSocket, ends: &WireEnds) -> Result<KernelDrops, NetlinkError> {
    pair_drops(route, &ends.vm_ifname, ends.sw_ifname.as_deref())
}

/// The same by the taps' names; without `sw`, a packet socket's end.
pub(super) fn pair_drops(
    route: &mut RouteSocket,
    vm: &str,
    sw: Option<&str>,
) -> Result<KernelDrops, NetlinkError> {
    let vm = route.link(vm)?;
    let Some(sw) = sw else {
        // `rx_dropped` of the tap says nothing here: it counts what reached the packet socket and
        // then found no further taker in the kernel.
        return Ok(KernelDrops {
            rx: 0,
            tx: vm.tx_dropped,
        });
    };
    let sw = route.link(sw)?;
    Ok(KernelDrops {
        rx: sw.tx_dropped + vm.rx_dropped,
        tx: vm.tx_dropped + sw.rx_dropped,
    })
}

/// Keeps the kernel from speaking IPv6 on taps made from here on.
pub(super) fn silence_ipv6() {
    for scope in ["all", "default"] {
        // It fails where /proc/sys is read-only or IPv6 is absent. Then the kernel's router
        // solicitations reach the guest's link, which a guest ignores.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1");
    }
}

impl WireEnds {
    /// Whether the VMM's tap is no longer there.
    pub(super) fn is_gone(&self, route: &mut RouteSocket) -> bool {
        route
            .link(&self.vm_ifname)
            .is_err_and(|error| error.errno == rustix::io::Errno::NODEV)
    }
}
