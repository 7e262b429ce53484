//! Properties of the handshake: a greeting is found in any rubbish and any pieces, and whatever a
//! broken session has left in the middle of a frame, the preamble fills it up.

use matchlock_wire::resync::{
    GREETING_BYTES, Greeting, Hunter, NONCE_BYTES, Nonce, PREAMBLE_BYTES, acknowledgement, hello,
};
use matchlock_wire::{PROTOCOL_VERSION, SPLIT_SEND_BYTES};
use proptest::collection::vec;
use proptest::prelude::*;

/// Feeds `wire` in pieces of these sizes. Returns all greetings with the position after each.
fn hunt(mut hunter: Hunter, wire: &[u8], pieces: &[usize]) -> Vec<(usize, Greeting)> {
    let mut found = Vec::new();
    let mut done = 0;
    for piece in pieces.iter().cycle() {
        if done == wire.len() {
            break;
        }
        let now = &wire[done..wire.len().min(done + piece)];
        let (taken, greeting) = hunter.feed(now);
        assert!(taken <= now.len());
        assert!(greeting.is_some() || taken == now.len());
        done += taken;
        found.extend(greeting.map(|greeting| (done, greeting)));
    }
    found
}

/// Rubbish that likes to look like the beginning of a greeting. Never a whole magic, which chance
/// does make of a piece and the next one's first byte: that swallows what follows it, see below.
fn rubbish() -> impl Strategy<Value = Vec<u8>> {
    const MAGIC_BYTES: usize = GREETING_BYTES - 2 - NONCE_BYTES;
    let hello_magic = hello(&[0; 16])[PREAMBLE_BYTES..][..MAGIC_BYTES].to_vec();
    let magics = [hello_magic, acknowledgement(&[0; 16])[..MAGIC_BYTES].to_vec()];
    let greeting = hello(&[0xAB; 16]).split_off(PREAMBLE_BYTES);
    let piece = prop_oneof![
        vec(any::<u8>(), 0..30),
        Just(vec![0xFF; 40]),
        (1..14_usize).prop_map(move |length| greeting[..length].to_vec()),
        (1..14_usize).prop_map(|length| acknowledgement(&[0xCD; 16])[..length].to_vec()),
    ];
    vec(piece, 0..10).prop_map(|pieces| pieces.concat()).prop_filter(
        "a whole magic",
        move |bytes| {
            bytes.windows(MAGIC_BYTES).all(|window| magics.iter().all(|magic| window != &magic[..]))
        },
    )
}

proptest! {
    #[test]
    fn a_hello_is_found_after_any_rubbish_in_any_pieces(
        before in rubbish(),
        after in vec(any::<u8>(), 0..50),
        nonce in any::<Nonce>(),
        pieces in vec(1..5000_usize, 1..8),
    ) {
        let hello = hello(&nonce);
        let wire = [&before[..], &hello, &after].concat();
        let end = before.len() + hello.len();
        let found = hunt(Hunter::for_hello(), &wire, &pieces);
        let expected = (end, Greeting { version: PROTOCOL_VERSION, nonce });
        prop_assert!(found.contains(&expected), "{found:?}");
    }

    #[test]
    fn an_acknowledgement_is_found_and_the_rest_left_alone(
        before in rubbish(),
        after in vec(any::<u8>(), 0..50),
        nonce in any::<Nonce>(),
    ) {
        // Rubbish in which a whole magic is complete swallows what follows it: no other side ends
        // a session in the middle of an acknowledgement without the host hunting for a new one.
        let wire = [&before[..], &acknowledgement(&nonce), &after].concat();
        let mut hunter = Hunter::for_acknowledgement();
        let (taken, greeting) = hunter.feed(&wire);
        prop_assert_eq!(greeting, Some(Greeting { version: PROTOCOL_VERSION, nonce }));
        prop_assert_eq!(taken, before.len() + GREETING_BYTES);
        prop_assert_eq!(hunter.stale_bytes(), before.len());
    }

    #[test]
    fn pieces_make_no_difference(
        wire in rubbish(),
        nonce in any::<Nonce>(),
        pieces in vec(1..40_usize, 1..8),
    ) {
        let wire = [&wire[..], &acknowledgement(&nonce), &wire].concat();
        prop_assert_eq!(
            hunt(Hunter::for_acknowledgement(), &wire, &pieces),
            hunt(Hunter::for_acknowledgement(), &wire, &[wire.len()])
        );
    }

    #[test]
    fn any_bytes_are_taken_and_counted(wire in vec(any::<u8>(), 0..500)) {
        let mut hunter = Hunter::for_hello();
        let (taken, greeting) = hunter.feed(&wire);
        prop_assert_eq!((taken, greeting), (wire.len(), None));
        let held = wire.len() - hunter.stale_bytes();
        prop_assert!(held < GREETING_BYTES);
    }

    /// A hello that broke off anywhere does not hide the next one.
    #[test]
    fn a_hello_that_broke_off_does_not_hide_the_next(
        cut in 0..PREAMBLE_BYTES + GREETING_BYTES,
        old in any::<Nonce>(),
        new in any::<Nonce>(),
    ) {
        let wire = [&hello(&old)[..cut], &hello(&new)].concat();
        let found = hunt(Hunter::for_hello(), &wire, &[4096]);
        let expected = Greeting { version: PROTOCOL_VERSION, nonce: new };
        prop_assert_eq!(found.last().map(|(_, greeting)| *greeting), Some(expected));
    }
}

/// Whatever frame an old session was in the middle of, the preamble completes it and goes on with a
/// header of a version that does not exist: a header cut off, whose length is completed by `0xFF`,
/// or a body cut off.
#[test]
fn the_preamble_is_longer_than_anything_it_may_have_to_fill_up() {
    const HEADER: usize = 12;
    const MAX_BODY: usize = 1024 * 1024;
    for cut in 1..HEADER {
        for body in 0..=SPLIT_SEND_BYTES {
            let mut length = u32::try_from(body).unwrap().to_be_bytes();
            length[cut.saturating_sub(8)..].fill(0xFF);
            let completed = usize::try_from(u32::from_be_bytes(length)).unwrap();
            // Longer than yamux takes is an error at once.
            let swallowed = if completed > MAX_BODY { 0 } else { completed };
            assert!(HEADER - cut + swallowed + HEADER <= PREAMBLE_BYTES);
        }
    }
}

#[test]
fn the_first_byte_of_a_magic_occurs_nowhere_else_in_it() {
    // What the hunter relies on to go on after a mismatch.
    let hello = hello(&[0; 16]).split_off(PREAMBLE_BYTES);
    let acknowledgement = acknowledgement(&[0; 16]);
    for greeting in [hello, acknowledgement] {
        assert_eq!(greeting.len(), GREETING_BYTES);
        let magic = &greeting[..14];
        assert!(!magic[1..].contains(&magic[0]));
        assert!(!magic.contains(&0xFF), "the preamble cannot begin one");
    }
}
