//! Small facts about this host: memory, processors, KVM, the boot id, the speed of the TSC.
//!
//! Everything here looks and changes nothing, except [`tsc_khz`], which keeps what it measured in
//! a file of the cache. A damaged or old file is measured anew; a file that cannot be written
//! costs the next caller 10 ms, no more.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use crate::process;

/// Why a fact could not be had.
#[derive(Debug, thiserror::Error)]
pub enum FactError {
    /// A file of the kernel could not be read.
    #[error("could not read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the kernel does not say what it should.
    #[error("could not find {what} in {path}")]
    Missing {
        /// What was looked for.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The processors could not be counted.
    #[error("could not count the processors")]
    Cpus(#[source] io::Error),
    /// The time stamp counter does not count like a clock.
    #[error("measured a time stamp counter of {khz} kHz, which cannot be")]
    Tsc {
        /// What was measured.
        khz: u64,
    },
}

fn read(path: &str) -> Result<String, FactError> {
    fs::read_to_string(path).map_err(|source| FactError::Read { path: path.into(), source })
}

/// The memory that could be given to something new without swapping, in MiB.
///
/// # Errors
/// When the kernel does not say.
pub fn available_memory_mb() -> Result<u64, FactError> {
    let path = "/proc/meminfo";
    mem_available_mb(&read(path)?)
        .ok_or_else(|| FactError::Missing { what: "MemAvailable", path: path.into() })
}

fn mem_available_mb(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// The processors that this process may use.
///
/// # Errors
/// When the kernel does not say.
pub fn cpus() -> Result<usize, FactError> {
    std::thread::available_parallelism().map(usize::from).map_err(FactError::Cpus)
}

/// The kernel's boot id.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn boot_id() -> Result<String, FactError> {
    process::boot_id().map_err(|source| FactError::Read {
        path: "/proc/sys/kernel/random/boot_id".into(),
        source,
    })
}

/// Whether KVM can run a guest here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// It can.
    Usable,
    /// It cannot, and why.
    Unusable(String),
}

impl Kvm {
    /// Whether it can.
    #[must_use]
    pub const fn is_usable(&self) -> bool {
        matches!(self, Self::Usable)
    }
}

/// Tries KVM: the processor has the extension, the device opens, speaks the one stable version of
/// its interface and makes a virtual machine (which is closed at once).
#[must_use]
pub fn kvm() -> Kvm {
    match try_kvm() {
        Ok(()) => Kvm::Usable,
        Err(why) => Kvm::Unusable(why),
    }
}

/// The version of KVM's interface since 2007; the kernel promises never to change it.
const KVM_API_VERSION: i32 = 12;

nix::ioctl_write_int_bad!(
    /// Asks for the version of the interface. Takes no argument, but wants 0.
    kvm_get_api_version, nix::request_code_none!(0xAE, 0x00));
nix::ioctl_write_int_bad!(
    /// Makes a virtual machine of the default type, 0; answers with its descriptor.
    kvm_create_vm, nix::request_code_none!(0xAE, 0x01));

fn try_kvm() -> Result<(), String> {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").map_err(|e| format!("/proc/cpuinfo: {e}"))?;
    if !has_virtualization(&cpuinfo) {
        return Err("the processor has neither vmx nor svm".to_owned());
    }
    let device = rustix::fs::open("/dev/kvm", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| format!("/dev/kvm: {}", io::Error::from(errno)))?;
    // SAFETY: the descriptor is open, and the call reads nothing but its argument, the number 0.
    let version = unsafe { kvm_get_api_version(device.as_raw_fd(), 0) }
        .map_err(|errno| format!("/dev/kvm does not tell its version: {errno}"))?;
    if version != KVM_API_VERSION {
        return Err(format!("/dev/kvm speaks version {version}, not {KVM_API_VERSION}"));
    }
    // SAFETY: as above.
    let machine = unsafe { kvm_create_vm(device.as_raw_fd(), 0) }
        .map_err(|errno| format!("/dev/kvm makes no virtual machine: {errno}"))?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    drop(unsafe { OwnedFd::from_raw_fd(machine) });
    Ok(())
}

pub(crate) fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// The file in the cache that holds the measured speed.
const TSC_FILE: &str = "tsc-khz";

/// How far the two samples lie apart at least.
const TSC_SPAN: Duration = Duration::from_millis(10);

/// What a time stamp counter can be: 100 MHz to 20 GHz.
const TSC_RANGE_KHZ: std::ops::RangeInclusive<u64> = 100_000..=20_000_000;

/// The speed of the time stamp counter in kHz: from the cache if it was measured since this boot,
/// or measured now, which takes 10 ms and blocks nobody. `None` on processors without one.
///
/// # Errors
/// When the boot id cannot be read, or what was measured cannot be.
pub async fn tsc_khz(cache: &Path) -> Result<Option<u64>, FactError> {
    if !cfg!(target_arch = "x86_64") {
        return Ok(None);
    }
    let boot_id = boot_id()?;
    let path = cache.join(TSC_FILE);
    if let Some(khz) = fs::read_to_string(&path).ok().and_then(|text| parse_tsc(&text, &boot_id)) {
        return Ok(Some(khz));
    }
    let Some(khz) = measure_tsc().await else { return Ok(None) };
    if !TSC_RANGE_KHZ.contains(&khz) {
        return Err(FactError::Tsc { khz });
    }
    if let Err(error) = write_atomically(&path, &format!("{boot_id} {khz}\n")) {
        tracing::debug!(path = %path.display(), %error, "could not keep the speed of the TSC");
    }
    Ok(Some(khz))
}

/// Reads a line of the cache; `None` when it is of another boot or damaged.
fn parse_tsc(text: &str, boot_id: &str) -> Option<u64> {
    let (boot, khz) = text.strip_suffix('\n')?.split_once(' ')?;
    let khz = khz.parse().ok()?;
    (boot == boot_id && TSC_RANGE_KHZ.contains(&khz)).then_some(khz)
}

/// Writes a file so that a reader sees the old one or the new one.
fn write_atomically(path: &Path, text: &str) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(text.as_bytes())?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

/// The counter and the clock, read at the same moment.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Sample {
    tsc: u64,
    nanos: u64,
}

#[cfg(target_arch = "x86_64")]
impl Sample {
    /// The best of 16: the one whose clock was read in the fewest ticks of the counter, because
    /// in the others something came between.
    fn take() -> Self {
        let mut best = (u64::MAX, Self { tsc: 0, nanos: 0 });
        for _ in 0..16 {
            let before = read_tsc();
            let nanos = read_clock();
            let width = read_tsc().wrapping_sub(before);
            if width < best.0 {
                best = (width, Self { tsc: before.wrapping_add(width / 2), nanos });
            }
        }
        best.1
    }
}

#[cfg(target_arch = "x86_64")]
fn read_tsc() -> u64 {
    // SAFETY: every x86_64 processor has the instruction; it only reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The clock that no time server bends, in nanoseconds. It always exists; it starts at 0.
#[cfg(target_arch = "x86_64")]
fn read_clock() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec to the address, which is that of a live one.
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC_RAW, &raw mut now);
    }
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Measures the counter against the clock.
#[cfg(target_arch = "x86_64")]
async fn measure_tsc() -> Option<u64> {
    let first = Sample::take();
    loop {
        tokio::time::sleep(TSC_SPAN).await;
        let last = Sample::take();
        let nanos = last.nanos.saturating_sub(first.nanos);
        // A paused clock of a test does not wait.
        if u128::from(nanos) >= TSC_SPAN.as_nanos() {
            let ticks = u128::from(last.tsc.wrapping_sub(first.tsc));
            let khz = (ticks * 1_000_000 + u128::from(nanos) / 2) / u128::from(nanos);
            return Some(u64::try_from(khz).unwrap_or(u64::MAX));
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
async fn measure_tsc() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: &str = "11111111-2222-4333-8444-555555555555";

    #[test]
    fn memory_is_read_in_mib() {
        let text = "MemTotal:       24684536 kB\nMemFree:  1 kB\nMemAvailable:   24095000 kB\n";
        assert_eq!(mem_available_mb(text), Some(23530));
        assert_eq!(mem_available_mb("MemTotal: 1 kB\n"), None);
        assert!(available_memory_mb().unwrap() > 0);
    }

    #[test]
    fn virtualization_is_a_whole_flag() {
        assert!(has_virtualization("model name: x\nflags\t\t: fpu svm sse\n"));
        assert!(has_virtualization("flags\t\t: fpu vmx\n"));
        assert!(!has_virtualization("flags\t\t: fpu svm_lock sse\nbugs: vmx\n"));
        assert!(!has_virtualization("vmx flags\t\t: ept vpid\n"));
    }

    #[test]
    fn a_cached_speed_counts_for_its_boot_only() {
        assert_eq!(parse_tsc(&format!("{BOOT} 2445426\n"), BOOT), Some(2_445_426));
        for damaged in ["", "\n", "x 2445426\n", &format!("{BOOT} 2445426"), &format!("{BOOT} 0\n")]
        {
            assert_eq!(parse_tsc(damaged, BOOT), None, "{damaged:?}");
        }
        assert_eq!(parse_tsc(&format!("{BOOT} 24454x6\n"), BOOT), None);
    }

    #[cfg(target_arch = "x86_64")]
    #[tokio::test]
    async fn the_speed_is_measured_once_per_boot() {
        let cache = tempfile::tempdir().unwrap();
        let file = cache.path().join(TSC_FILE);
        let first = tsc_khz(cache.path()).await.unwrap().unwrap();
        let kept = fs::read_to_string(&file).unwrap();
        assert_eq!(kept, format!("{} {first}\n", boot_id().unwrap()));
        assert_eq!(tsc_khz(cache.path()).await.unwrap(), Some(first));

        // Two measurements agree to a thousandth; a damaged file is replaced.
        fs::write(&file, "rubbish").unwrap();
        let second = tsc_khz(cache.path()).await.unwrap().unwrap();
        assert!(first.abs_diff(second) < first / 1000, "{first} and {second}");
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            format!("{} {second}\n", boot_id().unwrap())
        );
    }

    #[tokio::test]
    async fn a_cache_that_cannot_be_written_is_no_error() {
        let khz = tsc_khz(Path::new("/proc/no/such/place")).await.unwrap();
        assert_eq!(khz.is_some(), cfg!(target_arch = "x86_64"));
    }
}
