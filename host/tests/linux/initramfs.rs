//! Initramfs archives with a tiny `/init`, so that the ways in which a guest can end are tried
//! without a guest agent.

/// What the guest's init does.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Init<'a> {
    /// There is none: the kernel panics for want of a root.
    Missing,
    /// Prints this and powers off.
    PowerOff(&'a str),
    /// Prints this and reboots.
    Reboot(&'a str),
    /// Prints this and exits, which panics the kernel.
    Exit(&'a str),
    /// Prints this and sleeps for ever.
    Sleep(&'a str),
}

/// The argument of reboot(2) that powers off.
const POWER_OFF: u32 = 0x4321_FEDC;

/// The argument of reboot(2) that restarts.
const RESTART: u32 = 0x0123_4567;

/// The archive with this init.
pub(crate) fn archive(init: Init<'_>) -> Vec<u8> {
    let mut archive = Vec::new();
    match init {
        Init::Missing => {}
        Init::PowerOff(text) => add(&mut archive, "init", &program(text, &reboot(POWER_OFF))),
        Init::Reboot(text) => add(&mut archive, "init", &program(text, &reboot(RESTART))),
        Init::Exit(text) => add(&mut archive, "init", &program(text, &exit())),
        Init::Sleep(text) => add(&mut archive, "init", &program(text, &pause())),
    }
    add(&mut archive, "TRAILER!!!", &[]);
    archive
}

/// Appends a file in the `newc` format of cpio.
fn add(archive: &mut Vec<u8>, name: &str, content: &[u8]) {
    let mode = if content.is_empty() { 0 } else { 0o100_755 };
    let (size, name_size) = (content.len(), name.len() + 1);
    // inode, mode, uid, gid, links, time, size, device (2), special device (2), name size, sum
    let fields = [1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// The address at which the program is loaded.
const BASE: u64 = 0x40_0000;

/// The size of the ELF header and one program header.
const HEADERS: usize = 64 + 56;

/// A static x86_64 program that writes a text to stdout and goes on with `rest`.
fn program(text: &str, rest: &[u8]) -> Vec<u8> {
    let length = u32::try_from(text.len()).expect("a short text");
    // mov eax, 1 (write); mov edi, 1; mov edx, length; lea rsi, [rip + ...]; syscall
    let mut code = vec![0xB8, 1, 0, 0, 0, 0xBF, 1, 0, 0, 0, 0xBA];
    code.extend_from_slice(&length.to_le_bytes());
    code.extend_from_slice(&[0x48, 0x8D, 0x35]);
    // From the end of this instruction to the text: the syscall (2 bytes) and the rest.
    let distance = u32::try_from(2 + rest.len()).expect("a short program");
    code.extend_from_slice(&distance.to_le_bytes());
    code.extend_from_slice(&[0x0F, 0x05]);
    code.extend_from_slice(rest);
    code.extend_from_slice(text.as_bytes());

    let total = u64::try_from(HEADERS + code.len()).expect("a short program");
    let entry = BASE + u64::try_from(HEADERS).expect("a short header");
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    half(&mut elf, &[2, 62]); // an executable, for x86_64
    word(&mut elf, &[1]);
    long(&mut elf, &[entry, 64, 0]); // the program header follows; no sections
    word(&mut elf, &[0]);
    half(&mut elf, &[64, 56, 1, 64, 0, 0]);
    word(&mut elf, &[1, 5]); // load, readable and executable
    long(&mut elf, &[0, BASE, BASE, total, total, 0x1000]);
    elf.extend_from_slice(&code);
    elf
}

fn half(out: &mut Vec<u8>, values: &[u16]) {
    values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
}

fn word(out: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
}

fn long(out: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
}

/// mov eax, 169 (reboot); mov edi, magic; mov esi, magic; mov edx, how; syscall
fn reboot(how: u32) -> Vec<u8> {
    let mut code = vec![0xB8, 169, 0, 0, 0, 0xBF];
    code.extend_from_slice(&0xFEE1_DEAD_u32.to_le_bytes());
    code.push(0xBE);
    code.extend_from_slice(&672_274_793_u32.to_le_bytes());
    code.push(0xBA);
    code.extend_from_slice(&how.to_le_bytes());
    code.extend_from_slice(&[0x0F, 0x05]);
    code
}

/// mov eax, 60 (exit); mov edi, 3; syscall
fn exit() -> Vec<u8> {
    vec![0xB8, 60, 0, 0, 0, 0xBF, 3, 0, 0, 0, 0x0F, 0x05]
}

/// mov eax, 34 (pause); syscall; jmp back
fn pause() -> Vec<u8> {
    vec![0xB8, 34, 0, 0, 0, 0x0F, 0x05, 0xEB, 0xF7]
}
