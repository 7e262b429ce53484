//! PID 1 and agent of a Matchlock guest; everything is in the library.

fn main() -> ! {
    matchlock_guest::boot::main()
}
