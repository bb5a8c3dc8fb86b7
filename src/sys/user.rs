//! Users by the system's data base.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

/// Room for a user's entry. glibc suggests 1,024 (_SC_GETPW_R_SIZE_MAX); directories give longer ones.
const ENTRY_LEN_MAX: usize = 16 * 1024;

/// The user's name, wherever users are kept here (getpwuid_r(3)). `None` for an unknown one.
pub fn name_of(uid: u32) -> Option<String> {
    let mut entry = MaybeUninit::<libc::passwd>::uninit();
    let mut strings: Vec<c_char> = vec![0; ENTRY_LEN_MAX];
    let mut found = std::ptr::null_mut();
    // SAFETY: `entry` and `found` are valid for writes, `strings` for as many bytes as are said; all
    // outlive the call.
    let error = unsafe {
        libc::getpwuid_r(
            uid,
            entry.as_mut_ptr(),
            strings.as_mut_ptr(),
            strings.len(),
            &mut found,
        )
    };
    if error != 0 || found.is_null() {
        return None;
    }
    // SAFETY: found is not null, so `entry` was filled, and pw_name is a string of its own in
    // `strings`, which is alive.
    let name = unsafe { CStr::from_ptr((*found).pw_name) };
    name.to_str().ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_known_by_number() {
        assert_eq!(name_of(0).as_deref(), Some("root"));
        assert_eq!(name_of(4_000_000_000), None);
    }
}
