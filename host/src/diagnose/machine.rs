//! The hypervisor, what it runs on, and how fast.

use std::os::unix::fs::FileTypeExt as _;
use std::process::{Command, Stdio};

use super::{Check, Root, told};
use crate::facts;
use crate::hypervisor::Qemu;

/// The oldest kernel on which everything works: tables that go with their owner.
const GOOD_KERNEL: (u32, u32) = (5, 12);

/// The oldest kernel on which anything works: `openat2`, pidfds that can be waited for.
const LEAST_KERNEL: (u32, u32) = (5, 6);

/// What a VM has by default, and what stays for the host, in MiB.
const COMFORTABLE_MEMORY_MB: u64 = 512 + 64;

const BY_TRANSLATION: &str = "guests run by translation (TCG), about ten times slower";

/// Whether there is a hypervisor that runs, and its version.
#[must_use]
pub fn hypervisor() -> Check {
    let name = "hypervisor";
    let program = match Qemu::installed() {
        Ok(program) => program,
        Err(error) => {
            let fix = "install the package qemu-system-x86, or set MATCHLOCK_QEMU to a QEMU";
            return Check::fail(name, told(&error), fix);
        }
    };
    match qemu_version(&program) {
        Ok(version) => Check::pass(name, format!("{version} ({})", program.display())),
        Err(why) => Check::fail(
            name,
            format!("{} does not run: {why}", program.display()),
            "install the package qemu-system-x86 anew, or set MATCHLOCK_QEMU to a QEMU that runs",
        ),
    }
}

/// What `--version` prints, its first line.
fn qemu_version(program: &std::path::Path) -> Result<String, String> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = text.lines().next().unwrap_or_default().trim();
    match said.split_once("QEMU emulator version ") {
        Some((_, version)) if output.status.success() => Ok(format!("QEMU {version}")),
        _ => Err(format!("`--version` said {said:?}, {}", output.status)),
    }
}

/// Whether there is a device of KVM.
#[must_use]
pub fn kvm_device(root: &Root) -> Check {
    let name = "kvm-device";
    let path = root.path("/dev/kvm");
    let fix = "load the module kvm_intel or kvm_amd; in a VM, turn nested virtualization on; in a \
               container, pass --device /dev/kvm";
    match std::fs::metadata(&path) {
        Ok(found) if found.file_type().is_char_device() => Check::pass(name, "/dev/kvm is there"),
        Ok(_) => {
            let text = format!("/dev/kvm is no device: {BY_TRANSLATION}");
            Check::warn(name, text, fix)
        }
        Err(error) => Check::warn(name, format!("/dev/kvm: {error}: {BY_TRANSLATION}"), fix),
    }
}

/// Whether the processor can run guests itself.
#[must_use]
pub fn cpu_virtualization(root: &Root) -> Check {
    let name = "cpu-virtualization";
    match root.read("/proc/cpuinfo") {
        Err(error) => Check::warn(name, format!("/proc/cpuinfo: {error}"), "mount /proc"),
        Ok(cpuinfo) if facts::has_virtualization(&cpuinfo) => {
            Check::pass(name, "the processor has vmx or svm")
        }
        Ok(_) => Check::warn(
            name,
            format!("the processor has neither vmx nor svm: {BY_TRANSLATION}"),
            "turn virtualization on in the firmware, or nested virtualization where this VM runs",
        ),
    }
}

/// Whether KVM makes machines for us: tried, as a `run` does it.
#[must_use]
pub fn kvm_access() -> Check {
    from_kvm(facts::kvm())
}

fn from_kvm(kvm: facts::Kvm) -> Check {
    let name = "kvm-access";
    match kvm {
        facts::Kvm::Usable => Check::pass(name, "KVM makes virtual machines"),
        facts::Kvm::Unusable(why) => {
            let fix = if why.contains("ermission") {
                "add yourself to the group kvm (usermod -aG kvm USER) and log in anew"
            } else {
                "nothing is wrong with that but the speed; see kvm-device and cpu-virtualization"
            };
            Check::warn(name, format!("{why}: {BY_TRANSLATION}"), fix)
        }
    }
}

/// Whether the kernel has what is used of it.
#[must_use]
pub fn kernel(root: &Root) -> Check {
    let name = "kernel";
    let release = match root.read("/proc/sys/kernel/osrelease") {
        Ok(release) => release.trim().to_owned(),
        Err(error) => {
            return Check::fail(
                name,
                format!("/proc/sys/kernel/osrelease: {error}"),
                "mount /proc",
            );
        }
    };
    let Some(version) = version_of(&release) else {
        let text = format!("Linux {release:?} has no version that could be read");
        return Check::warn(name, text, "see whether it is at least 5.12");
    };
    if version < LEAST_KERNEL {
        let text = format!("Linux {release} is older than 5.6");
        return Check::fail(name, text, "boot a newer kernel, best 5.12 or later");
    }
    if version < GOOD_KERNEL {
        let text = format!(
            "Linux {release}: before 5.12 the firewall tables of a killed process stay until \
             `matchlock gc`"
        );
        return Check::warn(name, text, "boot Linux 5.12 or later");
    }
    Check::pass(name, format!("Linux {release}"))
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Whether there is memory for a VM.
#[must_use]
pub fn memory() -> Check {
    from_memory(facts::available_memory_mb())
}

fn from_memory(available: Result<u64, facts::FactError>) -> Check {
    let name = "memory";
    match available {
        Ok(mb) if mb >= COMFORTABLE_MEMORY_MB => {
            Check::pass(name, format!("{mb} MB are available"))
        }
        Ok(mb) => Check::warn(
            name,
            format!("{mb} MB are available, a VM wants 512 by default and 64 stay free"),
            "end something, or ask for less with --memory",
        ),
        Err(error) => Check::fail(name, told(&error), "mount /proc"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::Status;
    use super::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let root = Root::at(dir.path());
        (dir, root)
    }

    #[test]
    fn kernels() {
        for (release, status) in [
            ("6.1.0-56-cloud-amd64\n", Status::Pass),
            ("5.12.0\n", Status::Pass),
            ("5.11.22\n", Status::Warn),
            ("5.4.0-200\n", Status::Fail),
            ("4.19.1\n", Status::Fail),
            ("odd\n", Status::Warn),
        ] {
            let (_dir, root) = host(&[("proc/sys/kernel/osrelease", release)]);
            let check = kernel(&root);
            assert_eq!(check.status, status, "{check:?}");
            assert_eq!(check.fix.is_some(), status != Status::Pass);
        }
        assert_eq!(kernel(&host(&[]).1).status, Status::Fail);
    }

    #[test]
    fn processors() {
        let flags = |flags| host(&[("proc/cpuinfo", flags)]);
        assert_eq!(cpu_virtualization(&flags("flags : fpu svm\n").1).status, Status::Pass);
        assert_eq!(cpu_virtualization(&flags("flags : fpu\n").1).status, Status::Warn);
        assert_eq!(cpu_virtualization(&host(&[]).1).status, Status::Warn);
    }

    #[test]
    fn a_device_is_a_device() {
        assert_eq!(kvm_device(&host(&[("dev/kvm", "")]).1).status, Status::Warn);
        assert_eq!(kvm_device(&host(&[]).1).status, Status::Warn);
        let (dir, root) = host(&[("dev/x", "")]);
        std::os::unix::fs::symlink("/dev/null", dir.path().join("dev/kvm")).unwrap();
        assert_eq!(kvm_device(&root).status, Status::Pass);
    }

    #[test]
    fn kvm_that_does_not_work_says_why_and_what_to_do() {
        assert_eq!(from_kvm(facts::Kvm::Usable).status, Status::Pass);
        let denied = from_kvm(facts::Kvm::Unusable("/dev/kvm: Permission denied".into()));
        assert_eq!(denied.status, Status::Warn);
        assert!(denied.fix.unwrap().contains("group kvm"));
        assert!(denied.message.contains("Permission denied") && denied.message.contains("TCG"));
    }

    #[test]
    fn memory_is_compared_with_what_a_vm_wants() {
        assert_eq!(from_memory(Ok(100_000)).status, Status::Pass);
        assert_eq!(from_memory(Ok(100)).status, Status::Warn);
        let missing = facts::FactError::Missing { what: "MemAvailable", path: "/x".into() };
        assert_eq!(from_memory(Err(missing)).status, Status::Fail);
    }

    #[test]
    fn a_program_that_is_no_qemu_is_told_apart() {
        assert!(qemu_version("/bin/true".as_ref()).unwrap_err().contains("--version"));
        assert!(qemu_version("/nowhere/qemu".as_ref()).is_err());
    }
}
