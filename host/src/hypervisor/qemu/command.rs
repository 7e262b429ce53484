//! What QEMU is started with. Pure: the same input gives the same arguments.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use matchlock_wire::hold::HOLD_WORD;
use matchlock_wire::{BASE_DISK_SERIAL, PORT_NAME, ROOTFS_DISK_SERIAL};

use super::super::{MachineSpec, Nic, Start};

/// How guests are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceleration {
    /// By the processor.
    Kvm,
    /// By translation, which works anywhere.
    Tcg,
}

impl Acceleration {
    /// Its name, as QEMU has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What differs between two machines of one specification.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wiring {
    /// How it is run.
    pub(super) acceleration: Acceleration,
    /// The speed of the host's time stamp counter; used without KVM only.
    pub(super) tsc_khz: Option<u64>,
    /// The listening socket of the guest link.
    pub(super) link: RawFd,
    /// The listening socket of the control channel.
    pub(super) qmp: RawFd,
    /// The TAP, if there is a NIC.
    pub(super) tap: Option<RawFd>,
    /// The memory that it goes on from, if it does.
    pub(super) memory: Option<RawFd>,
}

/// The guest kernel's command line. Nothing that a user supplied is on it.
pub(super) fn kernel_command_line(start: &Start, wiring: &Wiring) -> String {
    // `panic=-1` and `reboot=t` turn a panic into a reset at once, and `-no-reboot` that into an
    // end. The rest spares a kernel that was built for every machine work on this one.
    let mut line = "console=ttyS0 reboot=t panic=-1 quiet loglevel=1 mitigations=off nokaslr \
                    no_timer_check noreplace-smp cryptomgr.notests init_on_alloc=0 audit=0 lsm= \
                    rcupdate.rcu_expedited=1 8250.nr_uarts=1 random.trust_cpu=on"
        .to_owned();
    if let (Acceleration::Tcg, Some(khz)) = (wiring.acceleration, wiring.tsc_khz) {
        // Without KVM the microvm has no clock to calibrate the TSC with: a kernel that is not
        // told its speed hangs, silently. It is the host's.
        line.push_str(&format!(" tsc_early_khz={khz} tsc=reliable"));
    }
    match start {
        Start::Boot => {}
        // The restored one's is in its memory already; what is said here is then only as long.
        Start::Hold | Start::Restore(_) => {
            line.push(' ');
            line.push_str(HOLD_WORD);
        }
    }
    line
}

/// A machine without what nobody needs. Its memory is neither in QEMU's core dumps nor merged with the
/// equal pages of others: how long a write takes would tell what those others have.
const MACHINE: &str =
    "microvm,acpi=on,rtc=on,pit=off,pic=off,x-option-roms=off,dump-guest-core=off,mem-merge=off";

/// QEMU's arguments. File names in the VM's directory are relative: it is the working directory.
pub(super) fn arguments(spec: &MachineSpec, base_disk: &Path, wiring: &Wiring) -> Vec<OsString> {
    let (accel, cpu) = match wiring.acceleration {
        Acceleration::Kvm => ("kvm", "host"),
        // `rep movsb` is translated byte by byte: the guest must not prefer it (twice as fast).
        Acceleration::Tcg => ("tcg,thread=multi", "max,erms=off,fsrm=off"),
    };
    let mut argv = Argv::default();
    argv.flag("-no-user-config").flag("-nodefaults").flag("-no-reboot");
    argv.pair("-display", "none")
        .pair("-name", spec.mark.to_string())
        .pair("-M", MACHINE)
        .pair("-accel", accel)
        .pair("-cpu", cpu)
        .pair("-smp", spec.vcpus.to_string())
        .pair("-m", format!("{}M", spec.memory_mb))
        .pair("-kernel", &spec.kernel)
        .pair("-initrd", &spec.initramfs)
        .pair("-append", kernel_command_line(&spec.start, wiring));
    argv.pair("-chardev", "file,id=console,path=logs/console.log")
        .pair("-serial", "chardev:console");
    argv.pair("-chardev", format!("socket,id=qmp,fd={},server=on,wait=off", wiring.qmp))
        .pair("-mon", "chardev=qmp,mode=control");
    argv.pair("-blockdev", blockdev("base", base_disk.as_os_str(), "read-only=on"))
        .pair("-device", format!("virtio-blk-device,drive=base,serial={BASE_DISK_SERIAL}"));
    argv.pair("-blockdev", blockdev("rootfs", OsStr::new("rootfs.ext4"), "discard=unmap"))
        // A full disk of the host is an error of the guest's, not a silent pause of it.
        .pair(
            "-device",
            format!(
                "virtio-blk-device,drive=rootfs,serial={ROOTFS_DISK_SERIAL},werror=report,rerror=report"
            ),
        );
    argv.pair("-chardev", format!("socket,id=link,fd={},server=on,wait=off", wiring.link))
        .pair("-device", "virtio-serial-device,max_ports=2")
        .pair("-device", format!("virtserialport,chardev=link,nr=1,name={PORT_NAME}"));
    argv.pair("-device", "virtio-rng-device");
    if let (Some(nic), Some(tap)) = (&spec.nic, wiring.tap) {
        // With vhost the host's kernel itself would serve the guest's queues; that is not for
        // guests that nobody trusts.
        argv.pair("-netdev", format!("tap,id=net0,fd={tap},vhost=off"))
            .pair("-device", network_device(nic));
    }
    if let Some(memory) = wiring.memory {
        // It runs as soon as it is loaded; what cannot be loaded ends QEMU.
        argv.pair("-incoming", format!("fd:{memory}"));
    }
    argv.0
}

/// The guest's side of the NIC. What is offloaded follows from the TAP: QEMU asks it.
fn network_device(nic: &Nic) -> String {
    let [a, b, c, d, e, f] = nic.mac;
    let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
    // A cable that can be pulled is first seen unplugged: Linux then says NO-CARRIER for up to a
    // second after the NIC is up. Nobody here ever pulls it.
    format!("virtio-net-device,netdev=net0,mac={mac},host_mtu={},status=off", nic.mtu)
}

/// A raw disk on a file. Its writes go to the host's page cache; the guest's flushes are obeyed.
/// QEMU's own lock on the file stays on.
fn blockdev(node: &str, file: &OsStr, options: &str) -> OsString {
    // The options must be on both nodes: the file node would otherwise be opened for writing, or
    // ignore the discard.
    let mut text = format!(
        "driver=raw,node-name={node},{options},file.driver=file,file.{options},\
         file.locking=on,file.filename="
    )
    .into_bytes();
    // A comma within a value is written twice.
    for &byte in file.as_bytes() {
        text.push(byte);
        if byte == b',' {
            text.push(byte);
        }
    }
    OsString::from_vec(text)
}

/// A list of arguments that is being written.
#[derive(Debug, Default)]
struct Argv(Vec<OsString>);

impl Argv {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn pair(&mut self, option: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.0.push(option.into());
        self.0.push(value.as_ref().to_owned());
        self
    }
}

#[cfg(test)]
mod tests {
    use matchlock_model::id::{InstallId, Mark, VmId};

    use super::*;
    use crate::rootfs::VmPaths;

    fn spec() -> MachineSpec {
        let vm = VmId::new(0x0bad_cafe);
        MachineSpec {
            mark: Mark { install: InstallId::from_bytes([1; 8]), vm },
            paths: VmPaths::new(Path::new("/h,ome/vms"), vm),
            kernel: "/c/kernel".into(),
            initramfs: "/c/initramfs".into(),
            base_disk: "/c,d/base.erofs".into(),
            vcpus: 2,
            memory_mb: 256,
            nic: None,
            start: Start::Boot,
        }
    }

    fn wiring(acceleration: Acceleration) -> Wiring {
        Wiring { acceleration, tsc_khz: Some(2_445_426), link: 7, qmp: 9, tap: None, memory: None }
    }

    fn value<'a>(argv: &'a [OsString], option: &str) -> Vec<&'a str> {
        argv.windows(2).filter(|pair| pair[0] == option).filter_map(|p| p[1].to_str()).collect()
    }

    #[test]
    fn the_mark_is_an_argument_of_its_own() {
        let spec = spec();
        let argv = arguments(&spec, &spec.base_disk, &wiring(Acceleration::Tcg));
        assert_eq!(value(&argv, "-name"), [spec.mark.to_string()]);
        assert_eq!((value(&argv, "-smp"), value(&argv, "-m")), (vec!["2"], vec!["256M"]));
    }

    #[test]
    fn the_clock_is_told_without_kvm_only() {
        let tcg = kernel_command_line(&Start::Boot, &wiring(Acceleration::Tcg));
        assert!(tcg.ends_with(" tsc_early_khz=2445426 tsc=reliable"), "{tcg}");
        let kvm = kernel_command_line(&Start::Boot, &wiring(Acceleration::Kvm));
        assert!(!kvm.contains("tsc"));
        assert!(!tcg.contains("  ") && !tcg.contains('\n'), "{tcg}");
    }

    #[test]
    fn the_vms_own_files_are_relative_and_its_directory_is_not_named() {
        let spec = spec();
        let argv = arguments(&spec, &spec.base_disk, &wiring(Acceleration::Kvm));
        assert!(argv.iter().all(|argument| !argument.to_string_lossy().contains("/h,ome")));
        assert!(value(&argv, "-blockdev")[1].ends_with(",file.filename=rootfs.ext4"));
    }

    #[test]
    fn a_nic_is_on_the_descriptor_that_was_given() {
        let mut spec = spec();
        let none = arguments(&spec, &spec.base_disk, &wiring(Acceleration::Kvm));
        assert!(value(&none, "-netdev").is_empty());
        let tap = std::fs::File::open("/dev/null").unwrap();
        let mac = VmId::new(0x0bad_cafe).mac();
        spec.nic =
            Some(Nic { mac, mtu: 1400, tap: std::sync::Arc::new(tap.into()), firewall: None });
        let wiring = Wiring { tap: Some(11), ..wiring(Acceleration::Kvm) };
        let argv = arguments(&spec, &spec.base_disk, &wiring);
        assert_eq!(value(&argv, "-netdev"), ["tap,id=net0,fd=11,vhost=off"]);
        let device = "virtio-net-device,netdev=net0,mac=aa:fc:0b:ad:ca:fe,host_mtu=1400,status=off";
        assert_eq!(value(&argv, "-device").last(), Some(&device));
        // Everything else is as it was.
        assert_eq!(argv[..none.len()], none);
    }

    #[test]
    fn a_restored_machine_is_told_what_the_held_one_was_told_and_its_memory() {
        let mut spec = spec();
        let booted = arguments(&spec, &spec.base_disk, &wiring(Acceleration::Tcg));
        assert!(!value(&booted, "-append")[0].contains(HOLD_WORD));
        spec.start = Start::Hold;
        let held = arguments(&spec, &spec.base_disk, &wiring(Acceleration::Tcg));
        assert!(value(&held, "-append")[0].ends_with(&format!(" {HOLD_WORD}")));
        spec.start = Start::Restore(std::fs::File::open("/dev/null").unwrap().into());
        let wiring = Wiring { memory: Some(12), ..wiring(Acceleration::Tcg) };
        let restored = arguments(&spec, &spec.base_disk, &wiring);
        assert_eq!(restored[..held.len()], held);
        assert_eq!(restored[held.len()..], ["-incoming", "fd:12"]);
    }

    #[test]
    fn a_comma_in_a_path_stays_in_the_path() {
        let spec = spec();
        let argv = arguments(&spec, &spec.base_disk, &wiring(Acceleration::Kvm));
        let base = value(&argv, "-blockdev")[0];
        assert!(base.ends_with(",file.filename=/c,,d/base.erofs"), "{base}");
        assert!(base.contains("node-name=base,read-only=on,"), "{base}");
    }
}
