//! The course of a measurement, on either side.

use super::end::{End, mtu, open, remote, wrap};
use super::network::{Done, Endpoint, Plan, Talk};
use super::{Args, Operation, PerfError, Via, setup};
use hw_model::hca::{Completion, RecvRequest, SendRequest, Status};
use std::fmt;
use std::time::{Duration, Instant};

/// Of the conversation.
const VERSION: u32 = 1;
/// A message that takes longer than this never comes.
const PATIENCE: Duration = Duration::from_secs(30);

/// What one side found.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    plan: Plan,
    /// How long the messages took; the side that listens does not know.
    elapsed: Option<Duration>,
    /// Bytes that were looked at.
    pub verified_bytes: u64,
    /// Of those, bytes that were not as they should be.
    pub wrong_bytes: u64,
    packets: u64,
    retries: u64,
    faults: u64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { operation, via, size, iterations, mtu, .. } = self.plan;
        let name = format!("{operation:?}").to_lowercase();
        let way = match via {
            Via::Udp => "UDP",
            Via::Shm => "shared memory",
        };
        writeln!(f, "{iterations} x {name} of {size} bytes over {way}, path MTU {mtu}")?;
        if let Some(elapsed) = self.elapsed {
            let seconds = elapsed.as_secs_f64().max(1e-9);
            let bytes = iterations as f64 * f64::from(size);
            let (rate, each) = (bytes / seconds / 1e6, seconds / iterations as f64 * 1e6);
            writeln!(f, "{rate:.1} MB/s, {each:.2} us a message, {seconds:.3} s")?;
        }
        writeln!(
            f,
            "{} packets sent, {} times sent again, {} page faults",
            self.packets, self.retries, self.faults
        )?;
        write!(f, "{} bytes verified, {} wrong", self.verified_bytes, self.wrong_bytes)
    }
}

/// Runs the side that the options ask for.
///
/// # Errors
/// See [`PerfError`].
pub fn run(args: &Args) -> Result<Summary, PerfError> {
    if !(0.0..=50.0).contains(&args.sides.loss) {
        return Err(PerfError::Loss { percent: args.sides.loss });
    }
    match (args.sides.listen, args.sides.connect) {
        (Some(address), _) => listen(args, Talk::listen(address, args.sides.port)?),
        (None, Some(address)) => connect(args, Talk::connect(address, args.sides.port)?),
        (None, None) => unreachable!("the command line asks for one of them"),
    }
}

fn listen(args: &Args, mut talk: Talk) -> Result<Summary, PerfError> {
    let plan: Plan = talk.hear()?;
    let fits = plan.version == VERSION
        && (1..=64 << 20).contains(&plan.size)
        && (1..=256).contains(&plan.window)
        && plan.iterations > 0;
    if !fits {
        return Err(PerfError::Peer { said: format!("{plan:?}") });
    }
    let (address, link) = open(args, plan.via, talk.own_address()?)?;
    let end = End::new(args, &plan, address, wrap(args, link)?)?;
    let bytes = u64::from(plan.size) * u64::from(plan.window);
    if plan.operation == Operation::Read {
        end.fill(bytes)?;
    }
    let peer: Endpoint = talk.hear()?;
    end.connect(&peer)?;
    if plan.operation == Operation::Send {
        for message in 0..plan.iterations.min(u64::from(plan.window)) {
            receive(&end, &plan, message)?;
        }
    }
    talk.say(&end.endpoint())?;
    if plan.operation == Operation::Send {
        receive_all(&end, &plan)?;
    }
    let mut done: Done = talk.hear()?;
    if plan.operation != Operation::Read {
        let written = u64::from(plan.size) * plan.iterations.min(u64::from(plan.window));
        done = Done { verified_bytes: written, wrong_bytes: end.wrong(written)? };
    }
    talk.say(&done)?;
    Ok(summary(&end, plan, None, done))
}

fn connect(args: &Args, mut talk: Talk) -> Result<Summary, PerfError> {
    let via = args.sides.via;
    let (address, link) = open(args, via, talk.own_address()?)?;
    let link = wrap(args, link)?;
    let plan = Plan {
        version: VERSION,
        operation: args.operation,
        via,
        size: args.size,
        iterations: args.iterations,
        window: args.window,
        mtu: mtu(args, via, &*link)?,
    };
    let end = End::new(args, &plan, address, link)?;
    let bytes = u64::from(plan.size) * u64::from(plan.window);
    if plan.operation != Operation::Read {
        end.fill(bytes)?;
    }
    talk.say(&plan)?;
    talk.say(&end.endpoint())?;
    let peer: Endpoint = talk.hear()?;
    end.connect(&peer)?;
    let begun = Instant::now();
    send_all(&end, &plan, &peer)?;
    let elapsed = begun.elapsed();
    let mut done = Done { verified_bytes: 0, wrong_bytes: 0 };
    if plan.operation == Operation::Read {
        let read = u64::from(plan.size) * plan.iterations.min(u64::from(plan.window));
        done = Done { verified_bytes: read, wrong_bytes: end.wrong(read)? };
    }
    talk.say(&done)?;
    let done: Done = talk.hear()?;
    Ok(summary(&end, plan, Some(elapsed), done))
}

fn summary(end: &End, plan: Plan, elapsed: Option<Duration>, done: Done) -> Summary {
    let stats = end.device.hca().stats();
    Summary {
        plan,
        elapsed,
        verified_bytes: done.verified_bytes,
        wrong_bytes: done.wrong_bytes,
        packets: stats.packets_sent,
        retries: stats.retries,
        faults: end.region.counters().page_faults,
    }
}

/// Where a message lies in both regions.
fn offset(plan: &Plan, message: u64) -> u64 {
    message % u64::from(plan.window) * u64::from(plan.size)
}

/// Posts all messages, as many at a time as the window allows, and waits for their ends.
fn send_all(end: &End, plan: &Plan, peer: &Endpoint) -> Result<(), PerfError> {
    let mut posted = 0;
    in_window(end, plan, &mut posted, |message| {
        let at = offset(plan, message);
        let local = [end.place(at, plan.size)];
        let request = match plan.operation {
            Operation::Write => SendRequest::write(message, &local, remote(peer, at)),
            Operation::Read => SendRequest::read(message, &local, remote(peer, at)),
            Operation::Send => SendRequest::send(message, &local),
        };
        end.qp.post_send(&request).map_err(setup("posting"))
    })
}

/// Takes all messages; the first receives are posted already.
fn receive_all(end: &End, plan: &Plan) -> Result<(), PerfError> {
    let mut posted = plan.iterations.min(u64::from(plan.window));
    in_window(end, plan, &mut posted, |message| receive(end, plan, message))
}

fn receive(end: &End, plan: &Plan, message: u64) -> Result<(), PerfError> {
    let local = [end.place(offset(plan, message), plan.size)];
    end.qp.post_recv(&RecvRequest::new(message, &local)).map_err(setup("posting a receive"))
}

fn in_window(
    end: &End,
    plan: &Plan,
    posted: &mut u64,
    mut post: impl FnMut(u64) -> Result<(), PerfError>,
) -> Result<(), PerfError> {
    let mut ended = 0;
    let mut completions: Vec<Completion> = Vec::with_capacity(plan.window as usize);
    while ended < plan.iterations {
        while *posted < plan.iterations && *posted - ended < u64::from(plan.window) {
            post(*posted)?;
            *posted += 1;
        }
        completions.clear();
        end.cq.poll(&mut completions, plan.window as usize).map_err(setup("completions were lost"))?;
        if completions.is_empty() && !end.cq.wait(PATIENCE) {
            return Err(PerfError::Silence { seconds: PATIENCE.as_secs(), ended });
        }
        for completion in &completions {
            if completion.status != Status::Success {
                return Err(PerfError::Transfer { message: completion.id.0, status: completion.status });
            }
            ended += 1;
        }
    }
    Ok(())
}
