//! vhost-user ports: sockets that guests' front-ends connect to.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::ports::{Opened, PortGuest};
use super::{Network, NetworkError, PortOptions, system};
use crate::config::{PortKind, PortSpec};
use crate::frame::{Mac, PortId};
use crate::port::vhost_user;
use crate::stats::PortCounters;
use crate::uplink::listen::{self, SocketFile};

/// A listening socket for vhost-user front-ends.
#[derive(Debug)]
pub struct VhostUserSocket {
    /// The socket. It ends with the port, for whoever else has it too.
    pub fd: OwnedFd,
    /// A front-end may be a guest of `lanlet exec`, who has its user's files.
    pub allow_guests: bool,
    /// What the log calls it: its path.
    pub name: String,
    /// Its file, removed with the port; `None`: somebody else takes care of it.
    pub file: Option<SocketFile>,
}

impl VhostUserSocket {
    /// Makes the socket at `path`, which only this user can connect to. One that was left there is
    /// replaced.
    ///
    /// # Errors
    /// It is in use, or can't be made.
    pub fn listen(path: &Path) -> Result<Self, NetworkError> {
        let (fd, file) = listen::open_path(path)?;
        Ok(Self {
            fd,
            allow_guests: false,
            name: path.display().to_string(),
            file: Some(file),
        })
    }
}

/// A vhost-user port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VhostUserPort {
    /// The port.
    pub id: PortId,
    /// A MAC for the guest, unique in this network.
    pub mac: Mac,
}

/// What lives as long as the port.
struct Attached {
    _server: vhost_user::Server,
    _file: Option<SocketFile>,
}

impl Network {
    /// Attaches a socket that vhost-user front-ends connect to, one at a time. The port stays until it is
    /// detached, whoever comes and goes; how many queues it has is each front-end's to say
    /// ([`vhost_user::device::QUEUE_PAIRS_MAX`] at most).
    ///
    /// # Errors
    /// It is no listening socket, or the system refused what the port needs.
    pub fn attach_vhost_user(
        &self,
        socket: VhostUserSocket,
        options: PortOptions,
    ) -> Result<VhostUserPort, NetworkError> {
        let mac = self.mac_for(&options);
        let failed = system("attach a vhost-user socket");
        listen::check_listening(&socket.fd).map_err(&failed)?;
        let counters = Arc::<PortCounters>::default();
        let port = vhost_user::open(
            socket.fd,
            socket.allow_guests,
            socket.name,
            Arc::clone(&counters),
        );
        let port = port.map_err(failed)?;
        let opened = Opened {
            counters,
            drops: Vec::new(),
            queues: vec![(Box::new(port.rx), Arc::new(port.tx))],
            kind: "vhost-user",
            wire: None,
            process: None,
            attached: Some(Arc::new(Attached {
                _server: port.server,
                _file: socket.file,
            })),
        };
        let guest = PortGuest {
            name: options.name,
            group: options.group,
            mac: Some(mac),
            ip: options.ip,
            leased: false,
        };
        let (id, _) = self.shared.add_port(opened, guest)?;
        Ok(VhostUserPort { id, mac })
    }

    /// Makes a port that the configuration names.
    pub(super) fn add_configured(&self, spec: &PortSpec) -> Result<(), NetworkError> {
        let options = PortOptions {
            name: spec.name.clone(),
            group: spec.group.clone(),
            ..PortOptions::default()
        };
        match &spec.kind {
            PortKind::VhostUser(path) => {
                let socket = VhostUserSocket {
                    allow_guests: spec.allow_guests,
                    ..VhostUserSocket::listen(path)?
                };
                self.attach_vhost_user(socket, options)?;
            }
        }
        Ok(())
    }
}
