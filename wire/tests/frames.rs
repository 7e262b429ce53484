//! Properties of the frame codec: nothing makes it panic, nothing makes it reserve more than the
//! limit, pieces make no difference, and every message comes back as it was.

#![expect(clippy::unwrap_used, reason = "all of this crate is a test")]

use bytes::{BufMut, BytesMut};
use matchlock_wire::frame::{Codec, FrameError, MAX_CHUNK_BYTES, MAX_FRAME_BYTES};
use matchlock_wire::message::{
    AgentInfo, Bytes, Configure, ExecAttach, ExecFailure, ExecFailureKind, ExecInput, ExecOutput,
    ExecStart, ExitStatus, FileOp, FileStart, JobId, Network, OutputStream, Reply, Request,
    Shutdown, Terminal, TerminalSize,
};
use proptest::collection::vec;
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::codec::{Decoder, Encoder};

fn bytes() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..40).prop_map(Bytes)
}

fn job() -> impl Strategy<Value = JobId> {
    any::<[u8; 16]>().prop_map(JobId)
}

fn exec() -> impl Strategy<Value = Request> {
    let what = (job(), vec(bytes(), 0..6), vec((bytes(), bytes()), 0..6));
    let how = (proptest::option::of(".{0,20}"), proptest::option::of(".{0,20}"), any::<bool>());
    let rest = (proptest::option::of(terminal()), any::<Option<u8>>());
    (what, how, rest).prop_map(|((job, argv, env), (cwd, user, stdin), (terminal, stop_signal))| {
        Request::Exec(ExecStart { job, argv, env, cwd, user, stdin, terminal, stop_signal })
    })
}

fn size() -> impl Strategy<Value = TerminalSize> {
    any::<(u16, u16)>().prop_map(|(rows, cols)| TerminalSize { rows, cols })
}

fn terminal() -> impl Strategy<Value = Terminal> {
    (size(), proptest::option::of(".{0,20}")).prop_map(|(size, term)| Terminal { size, term })
}

fn network() -> impl Strategy<Value = Network> {
    let macs = (any::<[u8; 6]>(), any::<[u8; 6]>());
    (macs, any::<[u8; 4]>(), any::<u8>(), any::<[u8; 4]>(), any::<u16>()).prop_map(
        |((mac, gateway_mac), address, prefix, gateway, mtu)| Network {
            mac,
            address: address.into(),
            prefix,
            gateway: gateway.into(),
            gateway_mac,
            mtu,
        },
    )
}

fn configure() -> impl Strategy<Value = Request> {
    let names = (".{0,20}", vec((".{0,20}", ".{0,20}"), 0..4), vec(".{0,20}", 0..4));
    let rest = (any::<u64>(), any::<u32>(), proptest::option::of(network()));
    (names, rest).prop_map(
        |((hostname, add_hosts, dns_servers), (clock_unix_ns, cpu_millis, network))| {
            Request::Configure(Configure {
                hostname,
                add_hosts,
                dns_servers,
                clock_unix_ns,
                cpu_millis,
                network,
            })
        },
    )
}

fn file_op() -> impl Strategy<Value = FileOp> {
    let option = || proptest::option::of(any::<u64>());
    prop_oneof![
        (".{0,40}", any::<u64>(), option()).prop_map(|(path, offset, length)| FileOp::Read {
            path,
            offset,
            length
        }),
        (".{0,40}", option(), any::<u32>()).prop_map(|(path, offset, mode)| FileOp::Write {
            path,
            offset,
            mode
        }),
        ".{0,40}".prop_map(|path| FileOp::List { path }),
    ]
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        Just(Request::Hello),
        configure(),
        exec(),
        (job(), file_op()).prop_map(|(job, op)| Request::File(FileStart { job, op })),
        (job(), any::<u64>()).prop_map(|(job, output_offset)| {
            Request::Attach(ExecAttach { job, output_offset })
        }),
        any::<u32>().prop_map(|grace_ms| Request::Shutdown(Shutdown { grace_ms })),
    ]
}

fn reply() -> impl Strategy<Value = Reply> {
    prop_oneof![
        Just(Reply::Done),
        ".{0,40}".prop_map(Reply::Failed),
        (".{0,20}", ".{0,20}", any::<u64>(), any::<u64>()).prop_map(
            |(agent_version, kernel_release, init_started_us, agent_ready_us)| {
                Reply::Hello(AgentInfo {
                    agent_version,
                    kernel_release,
                    init_started_us,
                    agent_ready_us,
                })
            }
        ),
    ]
}

fn input() -> impl Strategy<Value = ExecInput> {
    prop_oneof![
        (any::<u64>(), vec(any::<u8>(), 0..200))
            .prop_map(|(offset, data)| ExecInput::Stdin { offset, data }),
        any::<u64>().prop_map(|offset| ExecInput::StdinEof { offset }),
        any::<i32>().prop_map(ExecInput::Signal),
        size().prop_map(ExecInput::Resize),
        any::<u64>().prop_map(|offset| ExecInput::Ack { offset }),
        Just(ExecInput::Release),
    ]
}

fn output() -> impl Strategy<Value = ExecOutput> {
    let stream = prop_oneof![Just(OutputStream::Stdout), Just(OutputStream::Stderr)];
    let kind = prop_oneof![
        Just(ExecFailureKind::NotFound),
        Just(ExecFailureKind::NotExecutable),
        Just(ExecFailureKind::User),
        Just(ExecFailureKind::WorkingDirectory),
        Just(ExecFailureKind::Request),
        Just(ExecFailureKind::Unavailable),
    ];
    prop_oneof![
        Just(ExecOutput::Started),
        any::<u64>().prop_map(|stdin_offset| ExecOutput::Attached { stdin_offset }),
        (kind, ".{0,40}")
            .prop_map(|(kind, message)| ExecOutput::Failed(ExecFailure { kind, message })),
        (stream, any::<u64>(), vec(any::<u8>(), 0..200))
            .prop_map(|(stream, offset, data)| { ExecOutput::Output { stream, offset, data } }),
        any::<u64>().prop_map(|offset| ExecOutput::StdinAck { offset }),
        any::<u8>().prop_map(|code| ExecOutput::Exited(ExitStatus::Code(code))),
        any::<u8>().prop_map(|signal| ExecOutput::Exited(ExitStatus::Signal(signal))),
    ]
}

fn encode<M: Serialize + Clone>(messages: &[M]) -> BytesMut {
    let mut wire = BytesMut::new();
    for message in messages {
        Codec::<(), M>::default().encode(message.clone(), &mut wire).unwrap();
    }
    wire
}

/// Feeds `wire` in pieces of these sizes, round and round, and takes what comes.
fn decode<M: DeserializeOwned>(wire: &[u8], pieces: &[usize]) -> Result<Vec<M>, FrameError> {
    let mut codec = Codec::<M, ()>::default();
    let mut buffer = BytesMut::new();
    let mut messages = Vec::new();
    let mut rest = wire;
    for piece in pieces.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (now, later) = rest.split_at(rest.len().min(*piece));
        rest = later;
        buffer.extend_from_slice(now);
        while let Some(message) = codec.decode(&mut buffer)? {
            messages.push(message);
        }
    }
    assert!(buffer.is_empty(), "{} bytes left over", buffer.len());
    Ok(messages)
}

macro_rules! round_trip {
    ($name:ident, $message:ty, $strategy:expr) => {
        proptest! {
            #[test]
            fn $name(messages in vec($strategy, 0..8), pieces in vec(1..70_usize, 1..10)) {
                let wire = encode(&messages);
                prop_assert_eq!(decode::<$message>(&wire, &pieces).unwrap(), messages);
            }
        }
    };
}

round_trip!(requests_come_back_in_any_pieces, Request, request());
round_trip!(replies_come_back_in_any_pieces, Reply, reply());
round_trip!(inputs_come_back_in_any_pieces, ExecInput, input());
round_trip!(outputs_come_back_in_any_pieces, ExecOutput, output());

/// Decodes until an error or the need for more, with whatever the bytes claim to be.
fn swallow<M: DeserializeOwned + std::fmt::Debug>(wire: &[u8]) {
    let mut buffer = BytesMut::from(wire);
    let mut codec = Codec::<M, ()>::default();
    while let Ok(Some(_)) = codec.decode(&mut buffer) {}
    assert!(
        buffer.capacity() <= 4 * (MAX_FRAME_BYTES + wire.len()),
        "{} bytes reserved",
        buffer.capacity()
    );
}

proptest! {
    #[test]
    fn any_bytes_are_refused_without_a_panic(wire in vec(any::<u8>(), 0..300)) {
        swallow::<Request>(&wire);
        swallow::<Reply>(&wire);
        swallow::<ExecInput>(&wire);
        swallow::<ExecOutput>(&wire);
    }

    /// Bodies of the right length, so that the decoder of messages gets to see them.
    #[test]
    fn any_body_is_refused_without_a_panic(variant in 0..8_u8, body in vec(any::<u8>(), 0..300)) {
        let mut wire = BytesMut::new();
        wire.put_u32(u32::try_from(body.len() + 1).unwrap());
        wire.put_u8(variant);
        wire.extend_from_slice(&body);
        swallow::<Request>(&wire);
        swallow::<Reply>(&wire);
        swallow::<ExecInput>(&wire);
        swallow::<ExecOutput>(&wire);
    }

    /// One wrong byte anywhere: another message, an error or a wait for more, never a panic.
    #[test]
    fn a_flipped_byte_does_no_harm(request in request(), at in any::<prop::sample::Index>(), with in 1..=255_u8) {
        let mut wire = encode(&[request]);
        let at = at.index(wire.len());
        wire[at] ^= with;
        swallow::<Request>(&wire);
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_anything_is_reserved(
        len in u32::try_from(MAX_FRAME_BYTES).unwrap() + 1..=u32::MAX,
        body in vec(any::<u8>(), 0..20),
    ) {
        let mut buffer = BytesMut::new();
        buffer.put_u32(len);
        buffer.extend_from_slice(&body);
        let before = buffer.capacity();
        let error = Codec::<Request, ()>::default().decode(&mut buffer).unwrap_err();
        let expected = matches!(error, FrameError::TooLong { len: got } if got == len as usize);
        prop_assert!(expected, "not that: {error:?}");
        prop_assert_eq!(buffer.capacity(), before);
    }

    #[test]
    fn bytes_after_a_message_are_an_error(input in input(), extra in vec(any::<u8>(), 1..20)) {
        let whole = encode(&[input]);
        let body = &whole[4..];
        let mut wire = BytesMut::new();
        wire.put_u32(u32::try_from(body.len() + extra.len()).unwrap());
        wire.extend_from_slice(body);
        wire.extend_from_slice(&extra);
        let error = Codec::<ExecInput, ()>::default().decode(&mut wire).unwrap_err();
        let expected = matches!(error, FrameError::TrailingBytes { extra: got } if got == extra.len());
        prop_assert!(expected, "not that: {error:?}");
    }
}

#[test]
fn a_claim_of_many_elements_reserves_no_memory_for_them() {
    // An Exec whose argv claims 2^63 arguments, and one whose first argument claims as many bytes.
    let huge = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F];
    for prefix in [&[][..], &[1][..]] {
        let mut wire = BytesMut::new();
        let body = [&[2_u8][..], &[0; 16], prefix, &huge].concat();
        wire.put_u32(u32::try_from(body.len()).unwrap());
        wire.extend_from_slice(&body);
        let error = Codec::<Request, ()>::default().decode(&mut wire).unwrap_err();
        assert!(matches!(error, FrameError::Malformed { .. }), "{error:?}");
    }
}

#[test]
fn the_largest_chunk_and_the_largest_frame_fit_and_no_more() {
    let data = vec![7; MAX_CHUNK_BYTES];
    let chunk = ExecInput::Stdin { offset: u64::MAX, data };
    let wire = encode(std::slice::from_ref(&chunk));
    assert_eq!(decode::<ExecInput>(&wire, &[4096]).unwrap(), [chunk]);

    let of_length = |length: usize| ExecInput::Stdin { offset: 0, data: vec![0; length] };
    // Variant, offset and the length of so many bytes take 5.
    let largest = of_length(MAX_FRAME_BYTES - 5);
    let wire = encode(std::slice::from_ref(&largest));
    assert_eq!(wire.len(), 4 + MAX_FRAME_BYTES);
    assert_eq!(decode::<ExecInput>(&wire, &[wire.len()]).unwrap(), [largest]);
    let mut wire = BytesMut::new();
    let error = Codec::<(), ExecInput>::default()
        .encode(of_length(MAX_FRAME_BYTES - 4), &mut wire)
        .unwrap_err();
    assert!(matches!(error, FrameError::TooLong { .. }));
    assert!(wire.is_empty(), "nothing of it was written");
}
