//! Names of things: VMs, installations, generations, owners.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A VM's id: 32 random bits, written `vm-` and 8 hex digits.
///
/// The number is also the VM's byte in the lock file, see `host::owner_lock`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId(u32);

impl VmId {
    /// The id with this number.
    #[must_use]
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number behind the id.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The 8 hex digits, as TAP and table names use them.
    #[must_use]
    pub fn suffix(self) -> String {
        format!("{:08x}", self.0)
    }

    /// The hardware address of the guest's NIC: `aa:fc:` and the id's digits. 0xAA is a single
    /// device's address that nobody was given by a register.
    #[must_use]
    pub const fn mac(self) -> [u8; 6] {
        let [a, b, c, d] = self.0.to_be_bytes();
        [0xAA, 0xFC, a, b, c, d]
    }

    /// The hardware address of the host's end of its TAP: `aa:fd:` and the id's digits.
    #[must_use]
    pub const fn gateway_mac(self) -> [u8; 6] {
        let [a, b, c, d] = self.0.to_be_bytes();
        [0xAA, 0xFD, a, b, c, d]
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vm-{:08x}", self.0)
    }
}

/// A text that is not a VM id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a VM id: expected vm- and 8 lower-case hex digits, for example vm-0badcafe"
)]
pub struct InvalidVmId {
    /// What was given.
    pub text: String,
}

impl FromStr for VmId {
    type Err = InvalidVmId;

    fn from_str(text: &str) -> Result<Self, InvalidVmId> {
        let invalid = || InvalidVmId { text: text.to_owned() };
        let digits = text.strip_prefix("vm-").ok_or_else(invalid)?;
        let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if digits.len() != 8 || !digits.bytes().all(lower_hex) {
            return Err(invalid());
        }
        u32::from_str_radix(digits, 16).map(Self).map_err(|_| invalid())
    }
}

impl TryFrom<String> for VmId {
    type Error = InvalidVmId;

    fn try_from(text: String) -> Result<Self, InvalidVmId> {
        text.parse()
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> Self {
        id.to_string()
    }
}

/// An installation's id: one state directory, one id. Everything that we make on a host carries
/// it, and what carries another is left alone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstallId(String);

/// A text that is not an installation id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an installation id: expected 16 lower-case hex digits")]
pub struct InvalidInstallId {
    /// What was found.
    pub text: String,
}

impl InstallId {
    /// The id made of these random bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(format!("{:016x}", u64::from_be_bytes(bytes)))
    }

    /// The id's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InstallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for InstallId {
    type Err = InvalidInstallId;

    fn from_str(text: &str) -> Result<Self, InvalidInstallId> {
        let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() != 16 || !text.bytes().all(lower_hex) {
            return Err(InvalidInstallId { text: text.to_owned() });
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for InstallId {
    type Error = InvalidInstallId;

    fn try_from(text: String) -> Result<Self, InvalidInstallId> {
        text.parse()
    }
}

impl From<InstallId> for String {
    fn from(id: InstallId) -> Self {
        id.0
    }
}

/// The mark that each object of a VM carries on the host: `matchlock:<install-id>:<vm-id>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mark {
    /// Whose it is.
    pub install: InstallId,
    /// Which VM's it is.
    pub vm: VmId,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "matchlock:{}:{}", self.install, self.vm)
    }
}

impl Mark {
    /// Reads a mark; `None` when the text is something else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (install, vm) = text.strip_prefix("matchlock:")?.split_once(':')?;
        Some(Self { install: install.parse().ok()?, vm: vm.parse().ok()? })
    }
}

/// Counts the lives of a VM's actor in one process; answers to an older life are dropped.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Counts the owners of a VM; each take-over raises it, and writes of older owners are refused.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct OwnerEpoch(pub i64);

impl OwnerEpoch {
    /// The epoch of the process that made the VM.
    pub const FIRST: Self = Self(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_ids_read_back_what_they_print() {
        for number in [0, 1, 0x0bad_cafe, u32::MAX] {
            let id = VmId::new(number);
            assert_eq!(id.to_string().parse::<VmId>(), Ok(id));
        }
    }

    #[test]
    fn other_texts_are_not_vm_ids() {
        for text in
            ["", "vm-", "vm-123", "vm-123456789", "vm-0BADCAFE", "vm-+1234567", "0badcafe", "../x"]
        {
            assert!(text.parse::<VmId>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn a_hardware_address_is_the_id_of_one_device_and_locally_administered() {
        let mac = VmId::new(0x0bad_cafe).mac();
        assert_eq!(mac, [0xAA, 0xFC, 0x0B, 0xAD, 0xCA, 0xFE]);
        assert_eq!(mac[0] & 0b11, 0b10);
        let gateway = VmId::new(0x0bad_cafe).gateway_mac();
        assert_eq!(gateway, [0xAA, 0xFD, 0x0B, 0xAD, 0xCA, 0xFE]);
    }

    #[test]
    fn marks_read_back_what_they_print() {
        let mark = Mark { install: InstallId::from_bytes([7; 8]), vm: VmId::new(9) };
        assert_eq!(Mark::parse(&mark.to_string()), Some(mark));
        assert_eq!(Mark::parse("matchlock:zz:vm-00000009"), None);
    }
}
