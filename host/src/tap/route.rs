//! Questions and orders to the kernel over rtnetlink, each on a socket of its own.
//!
//! rtnetlink's own requests hide two things that count here: a dump that changed while it was read
//! (`NLM_F_DUMP_INTR`) may lack entries, and an error in the message that ends a dump. So messages
//! are sent as they are, and a dump is read again until it is whole.

use std::io;
use std::time::Duration;

use futures::StreamExt as _;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::{Handle, new_connection};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// The kernel answers at once; a message that could not be decoded is dropped by the library, and
/// only a deadline shows it. A deletion waits for grace periods, on a loaded machine for long.
const DEADLINE: Duration = Duration::from_secs(30);

/// How often an interrupted dump is read again.
const MAX_DUMPS: usize = 50;

/// A connection to the kernel; dropping it closes the socket.
pub(super) struct Route {
    handle: Handle,
    driver: JoinHandle<()>,
}

impl Drop for Route {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// The answer to one question, and whether it changed while it was given.
struct Answer {
    messages: Vec<RouteNetlinkMessage>,
    interrupted: bool,
}

impl Route {
    /// Connects, in the network namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let (mut connection, handle, _unasked) = new_connection()?;
        // Without these, an order that was never answered would look like one that was done.
        connection.set_forward_done(true);
        connection.set_forward_ack(true);
        Ok(Self { handle, driver: tokio::spawn(connection) })
    }

    /// Gives an order and waits until it is done.
    pub(super) async fn order(&self, message: RouteNetlinkMessage) -> io::Result<()> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_ACK).await.map(drop)
    }

    /// Makes something, or changes what is there, and waits until it is done.
    pub(super) async fn put(&self, message: RouteNetlinkMessage) -> io::Result<()> {
        let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.exchange(message, flags).await.map(drop)
    }

    /// Asks for one object; the kernel's ENODEV and the like are errors.
    pub(super) async fn ask(
        &self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        Ok(self.exchange(message, NLM_F_REQUEST).await?.messages)
    }

    /// Asks for all objects of a kind.
    pub(super) async fn dump(
        &self,
        message: &RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..MAX_DUMPS {
            let answer = self.exchange(message.clone(), NLM_F_REQUEST | NLM_F_DUMP).await?;
            if !answer.interrupted {
                return Ok(answer.messages);
            }
        }
        let why = format!("the list changed during each of {MAX_DUMPS} readings");
        Err(io::Error::new(io::ErrorKind::Interrupted, why))
    }

    async fn exchange(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Answer> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        let mut replies = self.handle.clone().request(request).map_err(io::Error::other)?;
        let mut answer = Answer { messages: Vec::new(), interrupted: false };
        let mut complete = false;
        let read = async {
            while let Some(reply) = replies.next().await {
                answer.interrupted |= reply.header.flags & NLM_F_DUMP_INTR != 0;
                match reply.payload {
                    NetlinkPayload::InnerMessage(message) => {
                        complete |= flags & (NLM_F_DUMP | NLM_F_ACK) == 0;
                        answer.messages.push(message);
                    }
                    NetlinkPayload::Error(error) => {
                        check(error.raw_code())?;
                        complete = true;
                    }
                    NetlinkPayload::Done(done) => {
                        check(done.code)?;
                        complete = true;
                    }
                    NetlinkPayload::Overrun(_) => return Err(incomplete("an overrun")),
                    _ => {}
                }
            }
            Ok(())
        };
        timeout(DEADLINE, read).await.map_err(|_| incomplete("silence"))??;
        if !complete {
            return Err(incomplete("a closed socket"));
        }
        Ok(answer)
    }
}

/// The kernel's code: 0, or an errno below zero.
fn check(code: i32) -> io::Result<()> {
    if code < 0 { Err(io::Error::from_raw_os_error(code.saturating_neg())) } else { Ok(()) }
}

fn incomplete(instead: &str) -> io::Error {
    let why = format!("the kernel's answer ended in {instead}");
    io::Error::new(io::ErrorKind::UnexpectedEof, why)
}
