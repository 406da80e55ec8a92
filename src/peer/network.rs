//! What the two sides tell each other over TCP: a line of JSON each, with a limit on its length.

use super::{PerfError, Via, setup};
use crate::perf::Operation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// The longest line.
const LINE: u64 = 64 << 10;
/// How long the side that connects tries, and how long an answer may take: the other side may move much data meanwhile.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is to be done, said by the side that connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Of this conversation.
    pub version: u32,
    /// What moves the data.
    pub operation: Operation,
    /// What carries it.
    pub via: Via,
    /// Bytes of a message.
    pub size: u32,
    /// Messages.
    pub iterations: u64,
    /// Queue pairs.
    pub qps: u32,
    /// Messages under way at a time on each.
    pub depth: u32,
    /// Payload of a full packet.
    pub mtu: u32,
}

impl Plan {
    /// Messages that both regions have places for.
    pub fn places(&self) -> u64 {
        u64::from(self.depth) * u64::from(self.qps)
    }
    /// Bytes of both regions that messages go to.
    pub fn bytes(&self) -> u64 {
        self.places() * u64::from(self.size)
    }
}

/// What one side must know of the other, said by both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The address of its port.
    pub address: IpAddr,
    /// Its queue pairs: the number of each, and the first sequence number that it sends.
    pub qps: Vec<(u32, u32)>,
    /// The key of its region.
    pub key: u32,
    /// Where the region begins, as the key names it.
    pub region: u64,
}

/// All has been sent, or looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Bytes that were looked at.
    pub verified_bytes: u64,
    /// Of those, bytes that were not as they should be.
    pub wrong_bytes: u64,
}

/// The conversation with the other side.
pub struct Talk {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Talk {
    /// Waits for the other side.
    pub fn listen(address: IpAddr, port: u16) -> Result<Self, PerfError> {
        let what = || format!("cannot listen at TCP port {port} of {address}");
        let listener = TcpListener::bind((address, port)).map_err(setup(what()))?;
        let (stream, _) = listener.accept().map_err(setup(what()))?;
        Self::over(stream)
    }

    /// Connects to the other side, which may not be there yet.
    pub fn connect(address: IpAddr, port: u16) -> Result<Self, PerfError> {
        let end = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect((address, port)) {
                Ok(stream) => return Self::over(stream),
                Err(error) if Instant::now() > end => {
                    return Err(setup(format!("nobody listens at TCP port {port} of {address}"))(error));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn over(stream: TcpStream) -> Result<Self, PerfError> {
        stream.set_nodelay(true).map_err(setup("a TCP option"))?;
        let reader = BufReader::new(stream.try_clone().map_err(setup("a second handle of the connection"))?);
        Ok(Self { stream, reader })
    }

    /// The own address on the way to the other side.
    pub fn own_address(&self) -> Result<IpAddr, PerfError> {
        Ok(self.stream.local_addr().map_err(setup("the own address"))?.ip())
    }

    /// Says something.
    pub fn say(&mut self, what: &impl Serialize) -> Result<(), PerfError> {
        let mut line = serde_json::to_vec(what).map_err(setup("a message to the other side"))?;
        line.push(b'\n');
        self.stream.write_all(&line).map_err(setup("the other side has gone"))
    }

    /// Hears what the other side says next.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<T, PerfError> {
        let mut line = Vec::new();
        let mut limited = (&mut self.reader).take(LINE);
        limited.read_until(b'\n', &mut line).map_err(setup("the other side has gone"))?;
        if line.is_empty() {
            return Err(setup("the other side has gone")(std::io::Error::from(
                std::io::ErrorKind::UnexpectedEof,
            )));
        }
        let said = || PerfError::Peer { said: String::from_utf8_lossy(&line).trim().to_owned() };
        serde_json::from_slice(&line).map_err(|_| said())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_means_nothing_or_never_ends_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let at = listener.local_addr().expect("its address");
        let mut other = TcpStream::connect(at).expect("connects");
        let mut talk = Talk::over(listener.accept().expect("comes").0).expect("a conversation");
        let done = Done { verified_bytes: 7, wrong_bytes: 0 };
        talk.say(&done).expect("said");
        let mut heard = String::new();
        BufReader::new(other.try_clone().expect("a handle")).read_line(&mut heard).expect("heard");
        other.write_all(heard.as_bytes()).expect("echoed");
        assert_eq!(talk.hear::<Done>().expect("the same"), done);
        other.write_all(b"GET / HTTP/1.1\r\n").expect("said");
        assert!(matches!(talk.hear::<Plan>(), Err(PerfError::Peer { .. })));
        other.write_all(&vec![b'x'; 2 * LINE as usize]).expect("said");
        drop(other);
        assert!(matches!(talk.hear::<Plan>(), Err(PerfError::Peer { .. })));
    }
}
