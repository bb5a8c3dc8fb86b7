//! The Internet checksum (RFC 1071).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One's-complement sum of big-endian 16-bit words, an odd last byte padded with zero. Sums of
/// even-length parts may be added.
pub fn sum(bytes: &[u8]) -> u64 {
    // The sum is independent of byte order (RFC 1071 2B): add native 32-bit words in four lanes,
    // which the compiler vectorises, and swap once at the end.
    let mut lanes = [0u64; 4];
    let mut chunks = bytes.chunks_exact(16);
    for chunk in &mut chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk.chunks_exact(4)) {
            *lane += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
        }
    }
    let mut total: u64 = lanes.iter().sum();
    let mut words = chunks.remainder().chunks_exact(2);
    for word in &mut words {
        total += u64::from(u16::from_ne_bytes([word[0], word[1]]));
    }
    if let [last] = words.remainder() {
        total += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    u64::from(u16::from_be(fold(total)))
}

/// Folds a sum to 16 bits; 0xffff over data that includes its checksum means "right".
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Sum of the IPv4 pseudo-header (RFC 9293 3.1) for a transport of `len` bytes.
pub fn pseudo_header4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, len: usize) -> u64 {
    sum(&source.octets()) + sum(&destination.octets()) + u64::from(protocol) + len as u64
}

/// Folded sum of pseudo-header and segment.
pub fn transport4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, segment: &[u8]) -> u16 {
    fold(pseudo_header4(source, destination, protocol, segment.len()) + sum(segment))
}

/// Sum of the IPv6 pseudo-header (RFC 8200 8.1) for an upper-layer packet of `len` bytes.
pub fn pseudo_header6(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, len: usize) -> u64 {
    sum(&source.octets()) + sum(&destination.octets()) + u64::from(protocol) + len as u64
}

/// Sum of the pseudo-header of either family.
///
/// # Panics
/// If the families of the two addresses differ.
pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, len: usize) -> u64 {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            pseudo_header4(source, destination, protocol, len)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            pseudo_header6(source, destination, protocol, len)
        }
        _ => panic!("{source} and {destination} are of different families"),
    }
}

/// Folded sum of pseudo-header and segment, either family.
///
/// # Panics
/// If the families of the two addresses differ.
pub fn transport(source: IpAddr, destination: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    fold(pseudo_header(source, destination, protocol, segment.len()) + sum(segment))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_1071_example() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&data)), 0xddf2);
    }

    #[test]
    fn any_length_equals_the_plain_definition() {
        let data: Vec<u8> = (0..200u32).map(|n| (n * 37 + 11) as u8).collect();
        for len in 0..data.len() {
            let mut plain = 0u64;
            for pair in data[..len].chunks(2) {
                plain += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            }
            assert_eq!(fold(sum(&data[..len])), fold(plain), "{len}");
        }
    }
}
