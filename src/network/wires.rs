//! The helper process and the wires it makes for VMMs.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags};

use super::{NetworkError, Shared, lock, system};
use crate::tap::{Event as HelperEvent, Helper, HelperEvents};

impl Shared {
    /// The helper process, started when the first VMM comes.
    pub(super) fn helper(self: &Arc<Self>) -> Result<Arc<Helper>, NetworkError> {
        let mut slot = lock(&self.helper);
        if let Some(helper) = &*slot {
            return Ok(Arc::clone(helper));
        }
        let (helper, events) = Helper::spawn(self.config.helper.as_deref())?;
        let helper = Arc::new(helper);
        let watched = Arc::downgrade(self);
        std::thread::Builder::new()
            .name("lanlet-helper".to_owned())
            .spawn(move || watch_helper(&events, &watched))
            .map_err(system("start a thread"))?;
        *slot = Some(Arc::clone(&helper));
        Ok(helper)
    }
}

/// Removes the ports of VMMs that are gone; ends with the helper.
fn watch_helper(events: &HelperEvents, shared: &std::sync::Weak<Shared>) {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN)];
        // An error other than EINTR shows in the receive that follows.
        let _ = rustix::event::poll(&mut fds, None);
        let event = events.next_event();
        let Some(shared) = shared.upgrade() else {
            return;
        };
        match event {
            Ok(Some(HelperEvent::Gone(wire))) => shared.detach_wire(wire),
            Ok(None) => {}
            Err(error) => {
                // Taken already if the network is stopping.
                if lock(&shared.helper).take().is_some() {
                    log::warn!(
                        "{error}; VMMs can attach again, those attached have lost their link"
                    );
                }
                return;
            }
        }
    }
}
