//! Which ports of the host the guests' sockets may have.
//!
//! What the kernel chooses itself comes from net.ipv4.ip_local_port_range (for IPv6 too). Below that range
//! are the ports that the host's services listen on or will: a guest's UDP socket never keeps such a port,
//! only a forward takes it. A TCP connection gets one outside the range only where the range is used up
//! toward its destination, with SO_REUSEADDR, so that a service that sets it, as servers do, can
//! still listen there. Ports that the administrator reserved (net.ipv4.ip_local_reserved_ports) stay free.

use std::fs;
use std::ops::RangeInclusive;

/// Ports below are for privileged services (RFC 6335 6, net.ipv4.ip_unprivileged_port_start).
const UNPRIVILEGED_MIN: u16 = 1_024;
/// The kernel's default range.
const RANGE_DEFAULT: (u16, u16) = (32_768, 60_999);
/// Ports that are tried, half of them above the range. With half of the ports taken, one connect in
/// 4 billion finds none.
const TRIES: u64 = 32;

/// The host's port ranges, as they were at start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LocalPorts {
    /// First and last of those that the kernel chooses from.
    pub(super) range: (u16, u16),
    reserved: Vec<RangeInclusive<u16>>,
}

impl LocalPorts {
    /// As the host has them.
    pub fn read() -> Self {
        let sysctl = |name| {
            let path = format!("/proc/sys/net/ipv4/{name}");
            fs::read_to_string(path).unwrap_or_default()
        };
        Self::parse(
            &sysctl("ip_local_port_range"),
            &sysctl("ip_local_reserved_ports"),
        )
    }

    pub(super) fn parse(range: &str, reserved: &str) -> Self {
        let mut ends = range.split_whitespace().map(str::parse);
        let range = match (ends.next(), ends.next()) {
            (Some(Ok(low)), Some(Ok(high))) if low <= high => (low, high),
            _ => RANGE_DEFAULT,
        };
        let reserved = reserved.trim().split(',').filter_map(|ports| {
            let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
            Some(first.parse().ok()?..=last.parse().ok()?)
        });
        let reserved = reserved.collect();
        Self { range, reserved }
    }

    fn is_reserved(&self, port: u16) -> bool {
        self.reserved.iter().any(|ports| ports.contains(&port))
    }

    /// Whether a guest's UDP socket may have the port that the guest uses.
    pub fn may_keep(&self, port: u16) -> bool {
        port >= self.range.0.max(UNPRIVILEGED_MIN) && !self.is_reserved(port)
    }

    /// Ports outside the range to try, by chance; `seed` is a random number.
    pub fn outside(&self, mut seed: u64) -> impl Iterator<Item = u16> + '_ {
        let (low, high) = (u32::from(self.range.0), u32::from(self.range.1));
        let least = u32::from(UNPRIVILEGED_MIN);
        let above = (high + 1).max(least)..u32::from(u16::MAX) + 1;
        let below = least..low.max(least);
        let sides = (0..TRIES).map(move |n| match n < TRIES / 2 {
            true => above.clone(),
            false => below.clone(),
        });
        let ports = sides.filter_map(move |side| {
            // Knuth's MMIX generator; the high bits are the good ones.
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let offset =
                (seed >> 33) as u32 % u32::try_from(side.len()).ok().filter(|&len| len > 0)?;
            u16::try_from(side.start + offset).ok()
        });
        ports.filter(|&port| !self.is_reserved(port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_guests_keep_and_what_is_tried() {
        let ports = LocalPorts::parse("32768\t60999\n", "40000,61000-65000\n");
        for (port, kept) in [
            (53, false),
            (1_900, false),
            (32_767, false),
            (32_768, true),
            (40_000, false),
            (60_999, true),
            (62_000, false),
            (65_001, true),
        ] {
            assert_eq!(ports.may_keep(port), kept, "{port}");
        }
        for seed in 0..100 {
            let tried: Vec<_> = ports.outside(seed << 40).collect();
            assert!(tried.len() >= TRIES as usize / 2);
            let right = |&port: &u16| (1_024..32_768).contains(&port) || port > 65_000;
            assert!(tried.iter().all(right), "{tried:?}");
        }
        // All ports are in the range, or nothing is known.
        let all = LocalPorts::parse("1 65535", "");
        assert_eq!(all.outside(7).count(), 0);
        assert!(all.may_keep(1_024) && !all.may_keep(1_023));
        assert_eq!(LocalPorts::parse("", "").range, RANGE_DEFAULT);
        let ports = LocalPorts::read();
        assert!(ports.may_keep(ports.range.1) || ports.is_reserved(ports.range.1));
    }
}
