//! Hypervisors: one suite for QEMU and the fake, and the ways in which a real guest ends.

use std::fs;
use std::io::Seek as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use matchlock_host::guest_bundle::GuestBundle;
use matchlock_host::hypervisor::{
    Acceleration, ExitReason, FakeHypervisor, Hypervisor, HypervisorError, LaunchFault, Machine,
    MachineExit, MachineSpec, Nic, Qemu, QemuOptions, Start,
};
use matchlock_host::process::{FakeProcesses, LinuxProcesses, Processes, Spawner};
use matchlock_host::rootfs::{LinuxRootfs, Rootfs, VmPaths};
use matchlock_model::id::Mark;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::{
    DEADLINE, Helper, Orphan, gone, helper_directory, soon, unique_mark, until_stdin_ends,
};
use crate::initramfs::{Init, archive};

/// A home with what a machine needs. Its path is longer than a socket's address may be.
struct World {
    home: TempDir,
    spec: MachineSpec,
    // Held: its machines die with its spawner.
    qemu: Qemu,
}

impl World {
    async fn new(init: Init<'_>) -> Self {
        let home = tempfile::tempdir().expect("a directory");
        let spec = make_spec(home.path(), unique_mark(), init).await;
        let qemu = qemu(home.path(), None);
        Self { home, spec, qemu }
    }

    async fn launch(&self) -> Arc<dyn Machine> {
        soon("launch", self.qemu.launch(&self.spec)).await.expect("it launches")
    }
}

fn qemu(home: &Path, acceleration: Option<Acceleration>) -> Qemu {
    let spawner = Spawner::new().expect("a spawner");
    Qemu::new(spawner, QemuOptions { program: None, acceleration, cache: home.to_owned() })
}

/// Makes the files of a VM below `home` and says what to launch.
async fn make_spec(home: &Path, mark: Mark, init: Init<'_>) -> MachineSpec {
    let vms = home.join("a-directory-of-a-long-name".repeat(5)).join("vms");
    fs::create_dir_all(&vms).expect("a directory");
    let paths = VmPaths::new(&vms, mark.vm);
    assert!(paths.link_socket().as_os_str().len() > 108);
    let rootfs = LinuxRootfs::new();
    rootfs.create_dir(&paths).await.expect("the VM's directory");
    rootfs.create_disk(&paths, 16).await.expect("the VM's disk");
    let (initramfs, base_disk) = (home.join("initramfs"), home.join("base,disk"));
    fs::write(&initramfs, archive(init)).expect("an initramfs");
    fs::write(&base_disk, vec![0; 1024 * 1024]).expect("a base disk");
    let kernel = kernel();
    MachineSpec {
        mark,
        paths,
        kernel,
        initramfs,
        base_disk,
        vcpus: 1,
        memory_mb: 256,
        nic: None,
        start: Start::Boot,
    }
}

/// The kernel of the guest bundle that the tests are given.
fn kernel() -> PathBuf {
    let Some(cache) = std::env::var_os("MATCHLOCK_TEST_CACHE") else {
        panic!("MATCHLOCK_TEST_CACHE is not set: run `make test`, or name a cache with a bundle");
    };
    match GuestBundle::find_with(Path::new(&cache), None, None) {
        Ok(bundle) => bundle.kernel,
        Err(error) => panic!("{error}"),
    }
}

async fn ended(machine: &Arc<dyn Machine>) -> MachineExit {
    soon("the end of the machine", machine.wait_exit()).await
}

/// What every implementation must do, with a guest that runs until it is killed.
async fn hypervisor_conforms(
    hypervisor: &dyn Hypervisor,
    processes: &dyn Processes,
    spec: &MachineSpec,
) {
    hypervisor.check().unwrap();
    let machine = soon("launch", hypervisor.launch(spec)).await.unwrap();
    let identity = machine.identity();
    assert!(processes.is_alive(&identity).unwrap());
    let found = processes.find_marked().unwrap();
    let found: Vec<_> = found.iter().filter(|found| found.mark == spec.mark).collect();
    assert_eq!(found.len(), 1);
    assert_eq!((&found[0].identity, found[0].cwd.as_ref()), (&identity, Some(&spec.paths.dir)));

    // The link can be dialled at once, long before the guest is up, and bytes wait.
    let mut link = soon("a link", machine.open_link()).await.unwrap();
    link.write_all(b"early").await.unwrap();

    let early = tokio::time::timeout(Duration::from_millis(50), machine.wait_exit()).await;
    assert!(early.is_err(), "it ended by itself: {early:?}");
    machine.console_tail(10).unwrap();

    for _ in 0..2 {
        soon("kill", machine.kill(DEADLINE)).await.unwrap();
        assert!(!processes.is_alive(&identity).unwrap());
    }
    let (one, two) = tokio::join!(ended(&machine), ended(&machine));
    assert_eq!((&one.reason, &one), (&ExitReason::Killed, &two));
    assert!(machine.open_link().await.is_err());
    let left = processes.find_marked().unwrap();
    assert!(left.iter().all(|found| found.mark != spec.mark), "{left:?}");

    // The same directory serves the next machine, and a stranger's SIGKILL is no order of ours.
    let machine = soon("launch", hypervisor.launch(spec)).await.unwrap();
    assert_ne!(machine.identity(), identity);
    processes.kill(&machine.identity(), DEADLINE).await.unwrap();
    let exit = ended(&machine).await;
    assert!(matches!(exit.reason, ExitReason::Died(_)), "{exit:?}");
    assert_eq!(exit.status, "signal: 9 (SIGKILL)");
    soon("kill", machine.kill(DEADLINE)).await.unwrap();
    assert_eq!(ended(&machine).await, exit);
}

/// What every implementation must do with a machine that is saved.
async fn saving_conforms(hypervisor: &dyn Hypervisor, spec: &MachineSpec) {
    let held = MachineSpec { start: Start::Hold, ..spec.clone() };
    let machine = soon("launch", hypervisor.launch(&held)).await.unwrap();
    let mut memory = tempfile::tempfile().unwrap();
    let saved = soon("save", machine.save(memory.try_clone().unwrap())).await.unwrap();
    assert_eq!((memory.metadata().unwrap().len(), saved.sha256.len()), (saved.bytes, 64));
    soon("kill", machine.kill(DEADLINE)).await.unwrap();
    machine.save(tempfile::tempfile().unwrap()).await.expect_err("it is gone");

    // As often as wanted; and cut off, it ends by itself.
    for is_whole in [true, true, false] {
        memory.set_len(if is_whole { saved.bytes } else { saved.bytes / 2 }).unwrap();
        memory.rewind().unwrap();
        let start = Start::Restore(Arc::new(memory.try_clone().unwrap()));
        let restored = MachineSpec { start, ..spec.clone() };
        let machine = soon("launch", hypervisor.launch(&restored)).await.unwrap();
        if is_whole {
            let early = tokio::time::timeout(Duration::from_secs(2), machine.wait_exit()).await;
            assert!(early.is_err(), "it ended by itself: {early:?}");
        } else {
            let exit = ended(&machine).await;
            assert!(
                matches!(&exit.reason, ExitReason::Died(said) if said.contains("load of migration failed")),
                "{exit:?}"
            );
        }
        soon("kill", machine.kill(DEADLINE)).await.unwrap();
    }

    // Whose machine it is makes no difference, and what it is like does.
    let of = |spec: MachineSpec| async move { hypervisor.fingerprint(&spec).await.unwrap() };
    let here = of(spec.clone()).await;
    let other = VmPaths::new(Path::new("/elsewhere"), spec.mark.vm);
    let elsewhere = MachineSpec { mark: unique_mark(), paths: other, ..spec.clone() };
    assert_eq!(of(elsewhere).await, here);
    assert_ne!(of(MachineSpec { vcpus: 2, ..spec.clone() }).await, here);
}

#[tokio::test]
async fn qemu_saves_and_restores() {
    let world = World::new(Init::Sleep("")).await;
    saving_conforms(&world.qemu, &world.spec).await;
}

#[tokio::test]
async fn qemu_conforms() {
    let mut world = World::new(Init::Sleep("")).await;
    world.spec.paths.dir = world.spec.paths.dir.canonicalize().unwrap();
    let processes = LinuxProcesses::new().unwrap();
    hypervisor_conforms(&world.qemu, &processes, &world.spec).await;
}

#[tokio::test]
async fn the_fake_conforms() {
    let processes = FakeProcesses::new();
    let paths = VmPaths::new(Path::new("/home/vms"), unique_mark().vm);
    let tap = Arc::new(OwnedFd::from(fs::File::open("/dev/null").unwrap()));
    let spec = MachineSpec {
        mark: unique_mark(),
        paths,
        kernel: "/k".into(),
        initramfs: "/i".into(),
        base_disk: "/b".into(),
        vcpus: 1,
        memory_mb: 64,
        nic: Some(Nic {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            tap: Arc::clone(&tap),
            firewall: None,
        }),
        start: Start::Boot,
    };
    let fake = FakeHypervisor::new(processes.clone());
    hypervisor_conforms(&fake, &processes, &spec).await;

    // What tests of actors ask of it.
    fake.set_launch_fault(Some(LaunchFault::Fails));
    assert!(fake.launch(&spec).await.is_err());
    fake.set_launch_fault(Some(LaunchFault::Never));
    let short = Duration::from_millis(20);
    assert!(tokio::time::timeout(short, fake.launch(&spec)).await.is_err());
    assert!(processes.find_marked().unwrap().is_empty());
    fake.set_launch_fault(Some(LaunchFault::DiesAtOnce));
    let machine = fake.launch(&spec).await.unwrap();
    assert!(matches!(ended(&machine).await.reason, ExitReason::Died(_)));

    fake.set_launch_fault(None);
    let machine = fake.launch(&spec).await.unwrap();
    let guest = fake.machine(spec.mark.vm).unwrap();
    let nic = guest.nic().unwrap();
    assert_eq!((nic.mac, nic.mtu), ([2, 0, 0, 0, 0, 1], 1500));
    drop(nic);
    let mut host_end = machine.open_link().await.unwrap();
    let mut guest_end = soon("the link", guest.accept_link()).await;
    host_end.write_all(b"ping").await.unwrap();
    let mut bytes = [0; 4];
    guest_end.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"ping");
    guest.print("one");
    guest.print("two");
    assert_eq!(machine.console_tail(1).unwrap(), ["two"]);

    guest.set_immortal(true);
    let error = machine.kill(short).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Process(_)), "{error:?}");
    guest.end(ExitReason::PowerOff);
    assert_eq!(ended(&machine).await.reason, ExitReason::PowerOff);
    assert_eq!(fake.launches().len(), 6);
    saving_conforms(&fake, &MachineSpec { nic: None, ..spec.clone() }).await;
    drop(spec);
    assert!(guest.nic().is_none());
    assert_eq!(Arc::strong_count(&tap), 1, "a machine that has ended holds its TAP");
}

/// Boots a guest that ends by itself.
async fn boot(init: Init<'_>) -> (World, Arc<dyn Machine>, MachineExit) {
    let world = World::new(init).await;
    let machine = world.launch().await;
    let exit = ended(&machine).await;
    (world, machine, exit)
}

#[tokio::test]
async fn a_guest_that_powers_off() {
    // A panic that the guest only speaks of is none.
    let text = "Kernel panic - not syncing: a joke\n";
    let (world, machine, exit) = boot(Init::PowerOff(text)).await;
    assert_eq!((exit.reason, &*exit.status), (ExitReason::PowerOff, "exit status: 0"));
    let console = machine.console_tail(100).unwrap();
    assert!(console.iter().any(|line| line == text.trim()), "{console:?}");
    // Nothing is left but the files that were known beforehand.
    let paths = &world.spec.paths;
    let mut expected = vec![paths.rootfs(), paths.hypervisor_json(), paths.logs()];
    expected.extend([paths.link_socket(), paths.qmp_socket()]);
    for entry in fs::read_dir(&paths.dir).unwrap() {
        let path = entry.unwrap().path();
        assert!(expected.contains(&path), "{} is unexpected", path.display());
    }
}

#[tokio::test]
async fn a_guest_that_reboots() {
    let (_world, _machine, exit) = boot(Init::Reboot("again\n")).await;
    assert_eq!(exit.reason, ExitReason::Reset);
}

#[tokio::test]
async fn a_guest_without_an_init_panics() {
    let (_world, _machine, exit) = boot(Init::Missing).await;
    let ExitReason::GuestPanic(line) = &exit.reason else { panic!("{exit:?}") };
    assert!(line.starts_with("VFS: Unable to mount root fs"), "{line}");
}

#[tokio::test]
async fn a_guest_whose_init_gives_up_says_why() {
    let (_world, _machine, exit) = boot(Init::Exit("matchlock-guest: fatal: no disk\n")).await;
    let expected = ExitReason::GuestPanic("matchlock-guest: fatal: no disk".to_owned());
    assert_eq!(exit.reason, expected);
}

#[tokio::test]
async fn what_qemu_finds_wrong_is_said() {
    let mut world = World::new(Init::Missing).await;
    world.spec.kernel = world.spec.base_disk.clone();
    let machine = world.launch().await;
    let exit = ended(&machine).await;
    let ExitReason::Died(printed) = &exit.reason else { panic!("{exit:?}") };
    assert!(printed.contains("kernel"), "{printed}");

    let mut world = World::new(Init::Missing).await;
    world.spec.memory_mb = 1 << 40;
    let machine = world.launch().await;
    let exit = ended(&machine).await;
    assert!(matches!(&exit.reason, ExitReason::Died(printed) if !printed.is_empty()), "{exit:?}");
}

#[tokio::test]
async fn a_stranger_who_stops_qemu_is_named() {
    let world = World::new(Init::Sleep("up\n")).await;
    let machine = world.launch().await;
    soon("the guest", async {
        while machine.console_tail(1).unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let pid = Pid::from_raw(machine.identity().pid).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let exit = ended(&machine).await;
    let ExitReason::Died(text) = &exit.reason else { panic!("{exit:?}") };
    // QEMU itself prints who sent the signal.
    assert!(text.starts_with("QEMU stopped: host-signal"), "{text}");
}

#[tokio::test]
async fn a_connection_ends_with_its_machine() {
    let mut world = World::new(Init::Sleep("")).await;
    world.qemu = qemu(world.home.path(), Some(Acceleration::Tcg));
    assert_eq!((world.qemu.backend(), world.qemu.acceleration()), ("qemu", "tcg"));
    let machine = world.launch().await;
    let mut link = machine.open_link().await.unwrap();
    machine.kill(DEADLINE).await.unwrap();
    let mut bytes = [0; 16];
    let read = soon("the end of the link", link.read(&mut bytes)).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}

#[tokio::test]
async fn a_launch_that_cannot_be_leaves_nothing() {
    let world = World::new(Init::Missing).await;
    let processes = LinuxProcesses::new().unwrap();

    let program = Some(PathBuf::from("no-such-qemu"));
    let options = QemuOptions { program, acceleration: None, cache: world.home.path().into() };
    let none = Qemu::new(Spawner::new().unwrap(), options);
    assert!(matches!(none.check(), Err(HypervisorError::NotInstalled { .. })));
    assert!(matches!(none.launch(&world.spec).await, Err(HypervisorError::NotInstalled { .. })));

    let missing = world.home.path().join("missing");
    let mut without_base = world.spec.clone();
    without_base.base_disk.clone_from(&missing);
    let error = world.qemu.launch(&without_base).await.err().unwrap();
    assert!(matches!(error, HypervisorError::File { what: "base disk", .. }), "{error:?}");
    assert!(!world.spec.paths.link_socket().try_exists().unwrap());

    // A program that cannot be executed after all: everything is made, and the spawn fails.
    let text = world.home.path().join("qemu");
    fs::write(&text, "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(&text, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let options =
        QemuOptions { program: Some(text), acceleration: None, cache: world.home.path().into() };
    let broken = Qemu::new(Spawner::new().unwrap(), options);
    broken.check().unwrap();
    let error = broken.launch(&world.spec).await.err().unwrap();
    assert!(matches!(error, HypervisorError::Spawn(_)), "{error:?}");
    let left = processes.find_marked().unwrap();
    assert!(left.iter().all(|found| found.mark != world.spec.mark), "{left:?}");
}

#[tokio::test]
async fn a_launch_that_is_given_up_leaves_no_process() {
    let world = World::new(Init::Sleep("")).await;
    let processes = LinuxProcesses::new().unwrap();
    let qemu = &world.qemu;
    qemu.calibrate().await.unwrap();
    // Given up later and later, until it is done first.
    for step in 0..60 {
        let patience = Duration::from_micros(50).mul_f64(1.2_f64.powi(step));
        let launched = tokio::time::timeout(patience, qemu.launch(&world.spec)).await;
        let done = launched.is_ok();
        if let Ok(machine) = launched {
            soon("kill", machine.unwrap().kill(DEADLINE)).await.unwrap();
        }
        soon("no process", async {
            while processes.find_marked().unwrap().iter().any(|p| p.mark == world.spec.mark) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        if done && step > 20 {
            return;
        }
    }
    panic!("no launch was ever done, however long it was given");
}

#[tokio::test]
async fn qemu_dies_with_a_process_that_is_killed() {
    let home = tempfile::tempdir().unwrap();
    let processes = LinuxProcesses::new().unwrap();
    let mut helper = Helper::start("hypervisor::helper_with_a_machine", home.path());
    let mark = Mark::parse(&helper.says("mark=").await).unwrap();
    let found = processes.find_marked().unwrap();
    let qemu = found.iter().find(|found| found.mark == mark).unwrap();
    let orphan = Orphan(qemu.identity.clone());
    helper.kill().await;
    gone(&processes, &orphan.0).await;
}

#[tokio::test]
#[ignore = "the main function of a helper process"]
async fn helper_with_a_machine() {
    let Some(home) = helper_directory("hypervisor::helper_with_a_machine") else { return };
    let spec = make_spec(&home, unique_mark(), Init::Sleep("")).await;
    let qemu = qemu(&home, None);
    let machine = qemu.launch(&spec).await.unwrap();
    println!("mark={}", spec.mark);
    until_stdin_ends().await;
    machine.kill(DEADLINE).await.unwrap();
}
