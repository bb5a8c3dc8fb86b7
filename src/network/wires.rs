//! The helper process and the wires it makes for VMMs.
//!
//! The helper sends its notices without waiting for anybody to want them, and answers requests one
//! by one. So the thread that takes the notices asks it nothing, and nobody asks it anything with a
//! lock held that this thread needs: each would wait for the other.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};

use rustix::event::{PollFd, PollFlags};

use super::ports::{Opened, PortWire, Queue};
use super::{KeptWire, NetworkError, Shared, lock, system};
use crate::port::{self, DropSource};
use crate::tap::{
    Event as HelperEvent, Helper, HelperEvents, KeptWireDrops, TapError, WireDrops, WireKind,
    WireOptions,
};

/// Kind of these ports.
const VMM: &str = "vmm";

/// What a VMM is given of its wire.
pub(super) struct VmmEnd {
    pub(super) fds: Vec<OwnedFd>,
    pub(super) ifname: String,
    pub(super) kept: Option<KeptWire>,
}

/// A port on a wire whose helper is gone.
pub(super) fn open_kept(wire: KeptWire) -> Result<Opened, NetworkError> {
    let open = |fd| -> Result<Queue, TapError> {
        let (rx, tx) = port::tap::open(fd)?;
        Ok((Box::new(rx), Arc::new(tx)))
    };
    let queues = wire
        .queues
        .into_iter()
        .map(open)
        .collect::<Result<_, _>>()?;
    let drops = KeptWireDrops::new(wire.netlink, wire.vm_ifname, wire.sw_ifname)
        .map_err(system("read a wire's counters"))?;
    Ok(Opened {
        counters: Arc::default(),
        queues,
        drops: vec![Arc::new(drops)],
        kind: VMM,
        wire: None,
        process: None,
        attached: None,
    })
}

impl Shared {
    /// Makes a wire: the switch's end as a port, and the VMM's.
    pub(super) fn open_wire(
        self: &Arc<Self>,
        options: WireOptions,
    ) -> Result<(Opened, VmmEnd), NetworkError> {
        let helper = self.helper()?;
        let wire = helper.create_wire(options)?;
        let mut drops: Vec<Arc<dyn DropSource>> =
            vec![Arc::new(WireDrops::new(Arc::clone(&helper), wire.id))];
        let mut open = |fd| -> Result<Queue, TapError> {
            Ok(match wire.kind {
                WireKind::Mirred => {
                    let (rx, tx) = port::tap::open(fd)?;
                    (Box::new(rx), Arc::new(tx))
                }
                WireKind::Packet => {
                    let (rx, tx, ring) = port::packet::open(fd, wire.uso)?;
                    drops.push(Arc::new(ring));
                    (Box::new(rx), Arc::new(tx))
                }
            })
        };
        let copies = wire.sw.iter().map(OwnedFd::try_clone);
        let kept = match wire.netlink {
            Some(netlink) if wire.kind == WireKind::Mirred => Some(KeptWire {
                queues: copies
                    .collect::<Result<_, _>>()
                    .map_err(system("keep a wire"))?,
                netlink,
                vm_ifname: wire.vm_ifname.clone(),
                sw_ifname: wire.sw_ifname,
            }),
            _ => None,
        };
        let queues = wire
            .sw
            .into_iter()
            .map(&mut open)
            .collect::<Result<_, _>>()?;
        let opened = Opened {
            counters: Arc::default(),
            queues,
            drops,
            kind: VMM,
            wire: Some(PortWire {
                helper,
                id: wire.id,
            }),
            process: None,
            attached: None,
        };
        let ifname = wire.vm_ifname;
        let fds = wire.vm;
        Ok((opened, VmmEnd { fds, ifname, kept }))
    }

    /// The helper process, started when the first VMM comes, and again when it had ended.
    fn helper(self: &Arc<Self>) -> Result<Arc<Helper>, NetworkError> {
        let mut slot = lock(&self.helper);
        // Looked at with the slot in hand: a network that stops empties it once, after its end.
        if let Some(end) = lock(&self.end).clone() {
            return Err(NetworkError::Ended(end));
        }
        if let Some(helper) = slot.as_ref().filter(|helper| !helper.is_ended()) {
            return Ok(Arc::clone(helper));
        }
        let (helper, events) = Helper::spawn(self.config.helper.as_deref())?;
        let helper = Arc::new(helper);
        let (watched, shared) = (Arc::downgrade(&helper), Arc::downgrade(self));
        std::thread::Builder::new()
            .name("lanlet-helper".to_owned())
            .spawn(move || watch_helper(&events, &watched, &shared))
            .map_err(system("start a thread"))?;
        *slot = Some(Arc::clone(&helper));
        Ok(helper)
    }

    /// Cleans up after a helper that has ended.
    fn helper_ended(&self, helper: &Weak<Helper>, error: &TapError) {
        let Some(ended) = helper.upgrade() else {
            // Nobody holds it any more: the network has stopped.
            return;
        };
        // First of all: whoever adds a port of its after the search below sees this.
        ended.end();
        lock(&self.helper).take_if(|current| Arc::ptr_eq(current, &ended));
        self.drop_wires(helper, |_| true);
        log::warn!("{error}; VMMs can attach again, those attached have lost their link");
    }
}

/// Removes the ports of VMMs that are gone; ends with the helper.
fn watch_helper(events: &HelperEvents, helper: &Weak<Helper>, shared: &Weak<Shared>) {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN)];
        // An error other than EINTR shows in the receive that follows.
        let _ = rustix::event::poll(&mut fds, None);
        let event = events.next_event();
        let Some(shared) = shared.upgrade() else {
            return;
        };
        match event {
            Ok(Some(HelperEvent::Gone(wire))) => shared.drop_wires(helper, |id| id == wire),
            Ok(None) => {}
            Err(error) => return shared.helper_ended(helper, &error),
        }
    }
}
