//! The control protocol: what is said over a network's socket.
//!
//! Each message is one line of JSON, of at most [`REQUEST_BYTES_MAX`] from a client. The server
//! speaks first with a [`Hello`]; then the client asks and the server answers, one [`Reply`] per
//! [`Request`], in order. A descriptor travels as SCM_RIGHTS with the bytes of the line it belongs
//! to.
//!
//! A port of [`Request::AttachTap`] or [`Request::AttachVhostUser`] lives as long as the connection that
//! made it, as does one of [`Request::AttachWire`]; a port of [`Request::AttachVmm`] as long as the VMM keeps
//! its descriptor open. A forward lives until it is removed, or as long as the connection that made it where
//! the request says so.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

pub use crate::frame::guest_mac;
use crate::names::{GroupName, GuestName, NameError};
use crate::nat::policy::parse::TEXT_LEN_MAX;
use crate::network::{ForwardStatus, GuestAddress, PortOptions, Status};

/// Version of the protocol. A client refuses another one. 1 had no [`Request::Stay`].
pub const PROTOCOL: u32 = 2;
/// Longest request, bytes: a policy, of which JSON writes line ends, tabs and quotes in two bytes, and as
/// much again as the other requests need (names, a MAC).
pub const REQUEST_BYTES_MAX: usize = 2 * TEXT_LEN_MAX + 4 * 1024;
/// Longest reply, bytes: a status with every MAC and lease the tables can hold, at 100 bytes each.
pub const REPLY_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Clients at a time: each namespace guest is one, and 1,024 is the usual limit of open files.
pub const CLIENTS_MAX: usize = 512;

/// What the server says first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub lanlet: u32,
    /// Version of the program.
    pub version: String,
    /// Name of the network.
    pub name: String,
    /// Process that runs it.
    pub pid: u32,
}

/// How a port is attached, as text.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortRequest {
    /// Name of the guest; empty: made from the kind and the id.
    #[serde(default)]
    pub name: String,
    /// Group of guests, as rules of the policy say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The guest's MAC.
    #[serde(default)]
    pub mac: Option<String>,
    /// Its MAC where none is said and no other port has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usual_mac: Option<String>,
    /// The guest's address, kept for it as long as the port lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<Ipv4Addr>,
    /// No virtio-net header and no offloads.
    #[serde(default)]
    pub no_offload: bool,
    /// Queues of the tap; 0 is 1.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub queues: u16,
    /// Of a VMM's port: what it takes to attach it again comes with the reply.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep: bool,
}

fn is_zero(number: &u16) -> bool {
    *number == 0
}

impl From<&PortOptions> for PortRequest {
    fn from(options: &PortOptions) -> Self {
        Self {
            name: options
                .name
                .as_ref()
                .map(GuestName::to_string)
                .unwrap_or_default(),
            group: options.group.as_ref().map(GroupName::to_string),
            mac: options.mac.map(|mac| mac.to_string()),
            usual_mac: options.usual_mac.map(|mac| mac.to_string()),
            ip: options.ip,
            no_offload: options.no_offload,
            queues: options.queues,
            keep: options.keep,
        }
    }
}

impl PortRequest {
    /// The options these words stand for.
    ///
    /// # Errors
    /// The MAC is none or a group's, or the name or the group is none.
    pub fn options(&self) -> Result<PortOptions, String> {
        let name = match self.name.as_str() {
            "" => None,
            name => Some(name.parse().map_err(|error: NameError| error.to_string())?),
        };
        let group = self.group.as_deref().map(str::parse).transpose();
        let group = group.map_err(|error: NameError| format!("group: {error}"))?;
        let mac = self.mac.as_deref().map(guest_mac).transpose()?;
        let usual_mac = self.usual_mac.as_deref().map(guest_mac).transpose()?;
        Ok(PortOptions {
            name,
            group,
            mac,
            usual_mac,
            ip: self.ip,
            no_offload: self.no_offload,
            queues: self.queues,
            keep: self.keep,
        })
    }
}

/// What a client can ask for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Nothing yet: who has not asked for anything is not waited for long.
    Stay {},
    /// The network's state.
    Status {},
    /// A tap for a VMM. Its descriptors, one for each queue, come with the reply.
    AttachVmm(PortRequest),
    /// Attaches the tap whose descriptors, one for each queue, come with the request; one more is a
    /// netlink socket of the guest's namespace, and one the guest's process.
    AttachTap(PortRequest),
    /// Attaches a VMM's port that was another network's. The switch's end of its wire, a descriptor for each
    /// queue, and a netlink socket of the taps' namespace come with the request.
    AttachWire {
        /// How it was attached.
        port: PortRequest,
        /// Name of the VMM's tap.
        vm_ifname: String,
        /// Name of the switch's tap.
        sw_ifname: String,
    },
    /// Has vhost-user front-ends connect to the listening socket whose descriptor comes with the request.
    AttachVhostUser(PortRequest),
    /// The process of a guest in namespaces. Its pidfd comes with the reply.
    GuestProcess {
        /// Its name or address.
        guest: String,
    },
    /// Removes a port.
    Detach {
        /// Its number.
        port: u16,
    },
    /// Adds a forward.
    ForwardAdd {
        /// It, in any of the forms that a forward is written in.
        forward: String,
        /// It ends with this connection.
        #[serde(default)]
        with_connection: bool,
    },
    /// The forwards.
    ForwardList {},
    /// Removes a forward.
    ForwardRemove {
        /// Its number, its name or its words.
        forward: String,
    },
    /// The egress policy in force, as text.
    Policy {},
    /// Puts another egress policy in force, and ends what it denies.
    SetPolicy {
        /// Its text.
        text: String,
    },
    /// Takes the egress policy out of force.
    ClearPolicy {},
    /// Ends the network.
    Stop {},
}

impl Request {
    /// Whether descriptors belong to the request.
    pub fn takes_fds(&self) -> bool {
        matches!(
            self,
            Request::AttachTap(_) | Request::AttachWire { .. } | Request::AttachVhostUser(_)
        )
    }
}

/// The answer to a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::AttachVmm`], with the VMM's descriptors.
    VmmPort {
        /// The port.
        port: u16,
        /// Name of the tap inside lanlet's private namespace.
        ifname: String,
        /// The guest's MAC.
        mac: String,
        /// Name of the switch's tap, where the port can be kept: the switch's descriptors, as many as the
        /// VMM's, and a netlink socket follow those of the VMM.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        kept: Option<String>,
    },
    /// To [`Request::AttachTap`] and [`Request::AttachWire`].
    TapPort {
        /// The port.
        port: u16,
        /// Its lease, where the request named a MAC.
        address: Option<GuestAddress>,
    },
    /// To [`Request::AttachVhostUser`].
    VhostUserPort {
        /// The port.
        port: u16,
        /// The guest's MAC.
        mac: String,
    },
    /// To [`Request::ForwardAdd`]: the forward, with the host's port that was chosen.
    Forward(ForwardStatus),
    /// To [`Request::ForwardList`].
    Forwards {
        /// In the order they were added.
        forwards: Vec<ForwardStatus>,
    },
    /// To [`Request::Policy`].
    Policy {
        /// Its rules; `None`: there is none.
        text: Option<String>,
    },
    /// To [`Request::GuestProcess`], with the pidfd.
    GuestProcess {},
    /// To [`Request::Detach`], [`Request::ForwardRemove`], [`Request::SetPolicy`] and
    /// [`Request::ClearPolicy`].
    Done {},
    /// To [`Request::Stop`].
    Stopping {
        /// Guests that are attached.
        guests: usize,
    },
    /// The request failed, or was none.
    Error {
        /// Why, with the remedy.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_on_the_wire() {
        let port = PortRequest {
            mac: Some("52:54:00:00:00:01".into()),
            ..PortRequest::default()
        };
        for (request, text) in [
            (Request::Status {}, r#"{"request":"status"}"#),
            (
                Request::Detach { port: 3 },
                r#"{"request":"detach","port":3}"#,
            ),
            (
                Request::ForwardAdd {
                    forward: "8080:web:80".into(),
                    with_connection: true,
                },
                r#"{"request":"forward_add","forward":"8080:web:80","with_connection":true}"#,
            ),
            (
                Request::AttachTap(port),
                r#"{"request":"attach_tap","name":"","mac":"52:54:00:00:00:01","no_offload":false}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&request).unwrap(), text);
            assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
        }
        for bad in [
            "",
            "{}",
            "[]",
            r#"{"request":"reboot"}"#,
            r#"{"request":"detach","port":70000}"#,
        ] {
            assert!(serde_json::from_str::<Request>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn port_requests_are_checked() {
        let with_mac = |mac: &str| PortRequest {
            mac: Some(mac.into()),
            ..PortRequest::default()
        };
        assert!(
            with_mac("52:54:00:00:00:01")
                .options()
                .unwrap()
                .mac
                .is_some()
        );
        for bad in ["01:00:5e:00:00:01", "00:00:00:00:00:00", "x"] {
            assert!(with_mac(bad).options().is_err(), "{bad}");
        }
        let named = |name: &str| PortRequest {
            name: name.into(),
            ..PortRequest::default()
        };
        assert_eq!(named("Web").options().unwrap().name, "web".parse().ok());
        assert_eq!(named("").options().unwrap().name, None);
        assert!(named("web 1").options().is_err());
        assert!(named("a\u{1b}[2J").options().is_err());
        assert!(named(&"x".repeat(64)).options().is_err());
    }
}
