//! DHCPv4 messages: what a client said, checked, and what the server answers (RFC 2131, RFC 2132).
//!
//! dhcproto's option codes, lazy option iterator and encoders do the work. Its decoder of whole
//! messages is not used: it does not check the magic cookie, ends silently at the first malformed
//! option, and its `chaddr()` panics when `hlen` exceeds 16. [`Request::parse`] checks the bytes
//! itself before it looks at any option.

use std::net::Ipv4Addr;

use dhcproto::v4::borrowed::{DhcpOption as RawOption, DhcpOptionIterator, Message as RawMessage};
use dhcproto::v4::{DhcpOption, Flags, MAGIC, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Encodable, Encoder};

use crate::dhcp::lease::CLIENT_ID_LEN_MAX;
use crate::frame::Mac;
use crate::names::GuestName;
use crate::stats::DropReason;

/// Bytes of the fixed part and the magic cookie (RFC 2131 3).
const HEADER_LEN: usize = 240;
/// Where the fields that options may overflow into lie (option 52, RFC 2132 9.3).
const SNAME: std::ops::Range<usize> = 44..108;
const FILE: std::ops::Range<usize> = 108..236;
/// BOOTP clients and relays drop shorter replies (RFC 951 3; RFC 1542 2.1).
const REPLY_LEN_MIN: usize = 300;
/// The least "maximum DHCP message size" a client may state, and the one assumed (RFC 2132 9.10). It
/// counts the IP packet.
const MESSAGE_SIZE_MIN: u16 = 576;
/// IP and UDP header.
const HEADERS_LEN: usize = 28;
/// Everything a reply MUST hold, with the longest client identifier, has to fit the least size:
/// type, server, lease time, T1, T2, identifier, rapid commit, mask, router, end.
const REQUIRED_LEN_MAX: usize =
    HEADER_LEN + 3 + 6 + 6 + 6 + 6 + (2 + CLIENT_ID_LEN_MAX) + 2 + 6 + 6 + 1;
const _: () = assert!(REQUIRED_LEN_MAX <= MESSAGE_SIZE_MIN as usize - HEADERS_LEN);

/// A client's message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// Option 53.
    pub kind: MessageType,
    /// Transaction id.
    pub xid: u32,
    /// The flags word; its top bit asks for broadcast replies.
    pub flags: Flags,
    /// The client's own address, if it has one and can answer ARP for it.
    pub ciaddr: Ipv4Addr,
    /// The relay agent's address.
    pub giaddr: Ipv4Addr,
    /// The client's hardware address.
    pub mac: Mac,
    /// Option 50.
    pub requested: Option<Ipv4Addr>,
    /// Option 54.
    pub server: Option<Ipv4Addr>,
    /// Option 51, seconds.
    pub lease_secs: Option<u32>,
    /// Option 57 or its default: the largest IP packet the client takes, bytes.
    pub message_size: u16,
    /// Option 55: the codes it wants, in its order.
    pub parameters: Vec<u8>,
    /// Option 61.
    pub client_id: Option<Vec<u8>>,
    /// Option 12, if a guest can be called that.
    pub hostname: Option<GuestName>,
    /// Option 80 (RFC 4039).
    pub rapid_commit: bool,
}

impl Request {
    /// Parses a UDP payload for port 67.
    ///
    /// # Errors
    /// [`DropReason::Truncated`]; [`DropReason::Malformed`] for anything that is not a request of an
    /// Ethernet client with whole options; [`DropReason::Unclaimed`] for plain BOOTP.
    pub fn parse(bytes: &[u8]) -> Result<Self, DropReason> {
        if bytes.len() < HEADER_LEN {
            return Err(DropReason::Truncated);
        }
        let message = RawMessage::new(bytes).map_err(|_| DropReason::Truncated)?;
        // Ethernet addresses alone: 16-byte ones (hlen) and longer lies end here.
        let ethernet = (u8::from(message.htype()), message.hlen()) == (1, 6);
        let cookie = bytes[HEADER_LEN - MAGIC.len()..HEADER_LEN] == MAGIC;
        if message.opcode() != Opcode::BootRequest || !ethernet || !cookie {
            return Err(DropReason::Malformed);
        }
        let mac = Mac::at(bytes, 28);
        if mac.is_group() || mac == Mac::default() {
            return Err(DropReason::Malformed);
        }
        let mut request = Self {
            kind: MessageType::Unknown(0),
            xid: message.xid(),
            flags: message.flags(),
            ciaddr: message.ciaddr(),
            giaddr: message.giaddr(),
            mac,
            requested: None,
            server: None,
            lease_secs: None,
            message_size: MESSAGE_SIZE_MIN,
            parameters: Vec::new(),
            client_id: None,
            hostname: None,
            rapid_commit: false,
        };
        let mut overload = 0;
        request.read_options(&bytes[HEADER_LEN..], &mut overload)?;
        // `file` first (RFC 2131 4.1). A second overload inside them means nothing.
        if overload & 1 != 0 {
            request.read_options(&bytes[FILE], &mut 0)?;
        }
        if overload & 2 != 0 {
            request.read_options(&bytes[SNAME], &mut 0)?;
        }
        match request.kind {
            MessageType::Unknown(0) => Err(DropReason::Unclaimed),
            _ => Ok(request),
        }
    }

    fn read_options(&mut self, bytes: &[u8], overload: &mut u8) -> Result<(), DropReason> {
        check_options(bytes)?;
        for option in DhcpOptionIterator::new(bytes) {
            self.take(&option, overload)?;
        }
        Ok(())
    }

    fn take(&mut self, option: &RawOption<'_>, overload: &mut u8) -> Result<(), DropReason> {
        let data = option.data();
        match option.code() {
            OptionCode::MessageType => self.kind = MessageType::from(fixed::<1>(data)?[0]),
            OptionCode::RequestedIpAddress => {
                self.requested = Some(Ipv4Addr::from(fixed::<4>(data)?));
            }
            OptionCode::ServerIdentifier => self.server = Some(Ipv4Addr::from(fixed::<4>(data)?)),
            OptionCode::AddressLeaseTime => {
                self.lease_secs = Some(u32::from_be_bytes(fixed(data)?));
            }
            OptionCode::MaxMessageSize => {
                self.message_size = u16::from_be_bytes(fixed(data)?).max(MESSAGE_SIZE_MIN);
            }
            OptionCode::OptionOverload => *overload = fixed::<1>(data)?[0],
            OptionCode::ParameterRequestList => self.parameters = data.to_vec(),
            OptionCode::RapidCommit => self.rapid_commit = true,
            OptionCode::ClientIdentifier => {
                if data.len() > CLIENT_ID_LEN_MAX {
                    return Err(DropReason::Malformed);
                }
                // Shorter than RFC 2132 9.14 allows: no identifier.
                self.client_id = (data.len() >= 2).then(|| data.to_vec());
            }
            OptionCode::Hostname => {
                // Some clients send a trailing NUL (RFC 2132 2 says to accept it).
                let text = data.strip_suffix(&[0]).unwrap_or(data);
                self.hostname = std::str::from_utf8(text).ok().and_then(GuestName::of_host);
            }
            _ => {}
        }
        Ok(())
    }
}

/// Refuses options that run over the end. A missing end option (255) is tolerated: the datagram
/// ends there.
fn check_options(mut rest: &[u8]) -> Result<(), DropReason> {
    loop {
        rest = match rest {
            [] | [255, ..] => return Ok(()),
            [0, rest @ ..] => rest,
            [_, len, rest @ ..] => rest.get(usize::from(*len)..).ok_or(DropReason::Malformed)?,
            [_] => return Err(DropReason::Malformed),
        };
    }
}

fn fixed<const N: usize>(data: &[u8]) -> Result<[u8; N], DropReason> {
    data.try_into().map_err(|_| DropReason::Malformed)
}

/// The addresses of a reply (RFC 2131 table 3). What a request has and a reply keeps is taken over.
#[derive(Clone, Copy, Debug)]
pub struct ReplyHeader {
    /// The client's address as it said itself.
    pub ciaddr: Ipv4Addr,
    /// The address given.
    pub yiaddr: Ipv4Addr,
}

/// The options of a reply, in the order in which they are written.
#[derive(Clone, Debug, Default)]
pub struct ReplyOptions {
    /// What RFC 2131 demands; always written.
    pub required: Vec<DhcpOption>,
    /// Configuration, in the server's order of importance. Those that the client listed come first,
    /// in its order; what does not fit its message size is left out.
    pub offered: Vec<DhcpOption>,
}

/// Writes a reply to `request` into `buffer`, cleared before: at least 300 bytes, at most what the
/// client and an MTU of `mtu` bytes take.
pub fn write_reply(
    buffer: &mut Vec<u8>,
    request: &Request,
    header: ReplyHeader,
    options: &ReplyOptions,
    mtu: u16,
) {
    buffer.clear();
    write_header(buffer, request, header);
    let limit = usize::from(request.message_size.min(mtu.max(MESSAGE_SIZE_MIN))) - HEADERS_LEN - 1;
    for option in &options.required {
        append(buffer, option, usize::MAX);
    }
    for option in in_clients_order(&options.offered, &request.parameters) {
        append(buffer, option, limit);
    }
    buffer.push(OptionCode::End.into());
    debug_assert!(buffer.len() <= limit + 1);
    if buffer.len() < REPLY_LEN_MIN {
        buffer.resize(REPLY_LEN_MIN, 0);
    }
}

fn write_header(buffer: &mut Vec<u8>, request: &Request, header: ReplyHeader) {
    let mut message = Message::default();
    message
        .set_opcode(Opcode::BootReply)
        .set_xid(request.xid)
        .set_flags(request.flags)
        .set_ciaddr(header.ciaddr)
        .set_yiaddr(header.yiaddr)
        .set_giaddr(request.giaddr)
        .set_chaddr(&request.mac.0);
    // Writing into a Vec fails only beyond usize::MAX bytes.
    let written = message.encode(&mut Encoder::new(buffer));
    debug_assert!(written.is_ok());
    // The options follow in an order that the message type's own map would not keep.
    buffer.truncate(HEADER_LEN);
}

/// The mask first (RFC 2132 3.3: before the router), then what the client listed in its order, then
/// the rest: RFC 2131 4.3.1 wants parameters with non-default values sent even if not asked for.
fn in_clients_order<'a>(offered: &'a [DhcpOption], listed: &[u8]) -> Vec<&'a DhcpOption> {
    let rank = |option: &DhcpOption| match OptionCode::from(option) {
        OptionCode::SubnetMask => 0,
        code => match listed.iter().position(|&listed| listed == u8::from(code)) {
            Some(at) => 1 + at,
            None => usize::MAX,
        },
    };
    let mut ordered: Vec<_> = offered.iter().collect();
    // Stable: what was not listed keeps the server's order.
    ordered.sort_by_key(|option| rank(option));
    ordered
}

/// Appends an option unless that makes the message longer than `limit`.
fn append(buffer: &mut Vec<u8>, option: &DhcpOption, limit: usize) {
    let start = buffer.len();
    let mut encoded = Vec::with_capacity(16);
    if option.encode(&mut Encoder::new(&mut encoded)).is_ok() && start + encoded.len() <= limit {
        buffer.extend_from_slice(&encoded);
    }
}
