//! What a real RDMA device answers: pinned and on-demand regions, written, read, dropped, and misused in every way that a
//! key is there to prevent. One JSON line a completion; `expected.jsonl` is what SoftRoCE said.
//!
//! The device is `ANYPAGE_LAB_DEVICE` (rxe0) with the GID index `ANYPAGE_LAB_GID_INDEX` (1).

mod report;

use oracle::memory::{Memory, PAGE};
use oracle::verbs::{Device, Domain, Error, Operation, Queue, RNR_FOR_EVER, Region, Request, access};
use report::{Header, Line, compare};
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

const PAGES: usize = 8;
/// What is registered of `PAGES` pages: memory goes on beyond both ends, so that only the key stands in the way. It begins
/// with a page: see [`inside_pages`].
const REGISTERED: Range<usize> = PAGE..(PAGES - 1) * PAGE - 64;

/// Memory and regions of one kind, new for every scenario, so that none depends on another.
struct World {
    kind: &'static str,
    flags: u32,
    domain: Rc<Domain>,
    local: Region,
    remote: Region,
}

impl World {
    fn new(device: &Rc<Device>, kind: &'static str, flags: u32) -> Result<Self, Error> {
        let domain = Domain::new(device)?;
        let region = |seed| {
            let memory = Memory::new(PAGES).map_err(|error| Error::Call("mmap", error))?;
            memory.write(0, &pattern(seed, memory.bytes()));
            Region::new(&domain, &Rc::new(memory), REGISTERED, access::ALL | flags)
        };
        let (local, remote) = (region(1)?, region(2)?);
        Ok(Self { kind, flags, domain, local, remote })
    }

    /// `length` bytes of each region, at `offset` into the remote one and at the start of the local one.
    fn request(&self, operation: Operation, offset: usize, length: usize) -> Request {
        let local = (self.local.address(), length as u32, self.local.lkey());
        Request { operation, local, remote: (self.remote.address() + offset as u64, self.remote.rkey()) }
    }

    fn local_bytes(&self, length: usize) -> Vec<u8> {
        self.local.memory.read(REGISTERED.start..REGISTERED.start + length)
    }

    fn remote_bytes(&self, offset: usize, length: usize) -> Vec<u8> {
        self.remote.memory.read(REGISTERED.start + offset..REGISTERED.start + offset + length)
    }

    fn line<'a>(&self, scenario: &'a str, side: &'static str, request: Request) -> Line<'a> {
        let posted = Some((report::operation(request.operation), request.local.1));
        Line { scenario, region: self.kind, side: Some(side), posted, ..Line::default() }
    }

    /// Runs one request on a new pair of queues and says what it says, and what `bytes` finds afterwards.
    fn run(
        &self,
        scenario: &str,
        request: Request,
        bytes: impl FnOnce() -> &'static str,
    ) -> Result<(), Error> {
        let (requester, _responder) = Queue::pair(&self.domain, RNR_FOR_EVER)?;
        let found = requester.run(request);
        let line = self.line(scenario, "requester", request).complete(found);
        Line { bytes: Some(bytes()), ..line }.print();
        Ok(())
    }

    /// A write of bytes seen nowhere else, and whether they arrived.
    fn write(&self, scenario: &str, offset: usize, length: usize) -> Result<(), Error> {
        let (sent, before) = (pattern(4, length), self.remote_bytes(offset, length));
        self.local.memory.write(REGISTERED.start, &sent);
        let request = self.request(Operation::Write, offset, length);
        self.run(scenario, request, || {
            compare(&self.remote_bytes(offset, length), &[("as sent", &sent), ("as before", &before)])
        })
    }

    /// A read and which of the candidates it brought; the first is what a processor would see there.
    fn read(&self, scenario: &str, offset: usize, candidates: &[(&'static str, &[u8])]) -> Result<(), Error> {
        let length = candidates[0].1.len();
        self.local.memory.write(REGISTERED.start, &pattern(3, length));
        let request = self.request(Operation::Read, offset, length);
        self.run(scenario, request, || compare(&self.local_bytes(length), candidates))
    }

    /// A request that should be refused: what it says, what became of both queues, and that no byte moved.
    fn refused(&self, scenario: &str, request: Request) -> Result<(), Error> {
        let (requester, responder) = Queue::pair(&self.domain, RNR_FOR_EVER)?;
        let everything =
            || (self.local.memory.read(0..PAGES * PAGE), self.remote.memory.read(0..PAGES * PAGE));
        let before = everything();
        let found = requester.run(request);
        let states = (settled(&requester)?, settled(&responder)?);
        let bytes = Some(if everything() == before { "as before" } else { "changed" });
        let line = self.line(scenario, "requester", request).complete(found);
        Line { bytes, states: Some(states), ..line }.print();
        Ok(())
    }
}

/// The state of a queue pair, given two seconds to become an error.
fn settled(queue: &Queue) -> Result<&'static str, Error> {
    let start = Instant::now();
    loop {
        let state = report::state(queue.state()?);
        if state == "ERR" || start.elapsed() > Duration::from_secs(2) {
            return Ok(state);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Bytes that tell where they come from: no two pages of it and no two seeds look alike, and none is zero.
fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|index| 1 + ((index * 7 + index / PAGE * 13 + seed * 83) % 255) as u8).collect()
}

/// Transfers whose packets all begin with a page, at a path MTU of a page.
fn transfers(world: &World) -> Result<(), Error> {
    let places = [
        ("no byte", 0, 0),
        ("one byte", 0, 1),
        ("a word", PAGE, 8),
        ("a page", 2 * PAGE, PAGE),
        ("pages and a bit", PAGE, 3 * PAGE + 100),
        ("everything", 0, REGISTERED.len()),
    ];
    for (name, offset, length) in places {
        world.write(name, offset, length)?;
        world.read(name, offset, &[("as there", &world.remote_bytes(offset, length))])?;
    }
    Ok(())
}

/// Transfers with packets that begin inside a page. For on-demand regions rdma_rxe gets them wrong: its copy
/// (drivers/infiniband/sw/rxe/rxe_odp.c, `__rxe_odp_mr_copy`) forgets the offset in the page, and where a packet goes on
/// to the next page it begins again with the packet's first byte. No oracle, then, but a record of what it does.
fn inside_pages(world: &World) -> Result<(), Error> {
    for (name, offset, length) in [
        ("one byte inside a page", 5, 1),
        ("a word inside a page", PAGE + 8, 8),
        ("across a page", 2 * PAGE - 96, 200),
    ] {
        let start = offset / PAGE * PAGE;
        let (sent, before) = (world.local_bytes(length), world.remote_bytes(offset, length));
        let request = world.request(Operation::Write, offset, length);
        world.run(name, request, || {
            let in_first = length.min(start + PAGE - offset);
            let found = world.remote_bytes(offset, length);
            if found != sent && world.remote_bytes(start, in_first) == sent[..in_first] {
                return "misplaced: at the start of the page";
            }
            compare(&found, &[("as sent", &sent), ("as before", &before)])
        })?;
        let (there, start_of_page) = (world.remote_bytes(offset, length), world.remote_bytes(start, length));
        let misplaced = ("misplaced: from the start of the page", start_of_page.as_slice());
        world.read(name, offset, &[("as there", &there), misplaced])?;
    }
    Ok(())
}

/// The pages of a region go away under it. A pinned region keeps the old ones: device and processor then disagree.
fn dropped(world: &World) -> Result<(), Error> {
    let (pages, offset, length) = (2 * PAGE..6 * PAGE, 2 * PAGE, PAGE);
    let lost = |error| Error::Call("madvise", error);
    let before = world.remote_bytes(offset, length);
    let sent = pattern(4, length);
    world.remote.memory.drop_pages(pages.clone()).map_err(lost)?;
    let zeros = vec![0; length];
    world.read(
        "dropped, then read",
        offset,
        &[("as the processor sees", &zeros), ("as before the drop", &before)],
    )?;
    world.write("dropped, then written", offset, length)?;
    let seen = world.remote_bytes(offset, length);
    world.read(
        "dropped, written, then read",
        offset,
        &[("as the processor sees", &seen), ("as the device wrote", &sent)],
    )?;
    let stored = pattern(5, length);
    world.remote.memory.write(REGISTERED.start + offset, &stored);
    let candidates: [(_, &[u8]); 2] = [("as the processor sees", &stored), ("as the device wrote", &sent)];
    world.read("dropped, written by the processor, then read", offset, &candidates)?;

    let before = world.local_bytes(PAGE);
    world.local.memory.drop_pages(0..2 * PAGE).map_err(lost)?;
    let request = world.request(Operation::Write, 0, PAGE);
    world.run("dropped on our side, then sent from", request, || {
        let candidates: [(_, &[u8]); 2] =
            [("as the processor sees", &zeros), ("as before the drop", &before)];
        compare(&world.remote_bytes(0, PAGE), &candidates)
    })
}

/// Nobody ever touched the remote pages.
fn untouched(world: &World, device: &Rc<Device>) -> Result<(), Error> {
    let fresh = World::new(device, world.kind, world.flags)?;
    let memory = Rc::new(Memory::new(PAGES).map_err(|error| Error::Call("mmap", error))?);
    let remote = Region::new(&fresh.domain, &memory, REGISTERED, access::ALL | fresh.flags)?;
    let fresh = World { remote, ..fresh };
    fresh.write("never touched, then written", PAGE, PAGE)?;
    fresh.read("never touched, then read", 4 * PAGE, &[("as there", &[0; PAGE])])
}

fn keys(world: &World, device: &Rc<Device>) -> Result<(), Error> {
    for operation in [Operation::Write, Operation::Read] {
        let good = world.request(operation, 0, 100);
        let (address, rkey) = good.remote;
        world.refused("another key", Request { remote: (address, rkey ^ 1), ..good })?;
        world.refused("a key of nothing", Request { remote: (address, 0x00ab_cd00), ..good })?;
        let end = REGISTERED.len() - 99;
        world.refused("one byte past the end", world.request(operation, end, 100))?;
        world.refused("one byte before the start", Request { remote: (address - 1, rkey), ..good })?;
        world
            .refused("another local key", Request { local: (good.local.0, 100, good.local.2 ^ 1), ..good })?;
        let beyond = good.local.0 + end as u64;
        world
            .refused("one local byte past the end", Request { local: (beyond, 100, good.local.2), ..good })?;

        let deny = if operation == Operation::Write { access::REMOTE_WRITE } else { access::REMOTE_READ };
        let rights = access::ALL & !deny | world.flags;
        let lesser = Region::new(&world.domain, &world.remote.memory, REGISTERED, rights)?;
        world.refused("no permission", Request { remote: (address, lesser.rkey()), ..good })?;
        let gone = lesser.rkey();
        drop(lesser);
        world.refused("a deregistered key", Request { remote: (address, gone), ..good })?;
        let stranger = Domain::new(device)?;
        let theirs = Region::new(&stranger, &world.remote.memory, REGISTERED, access::ALL | world.flags)?;
        world.refused("another domain's key", Request { remote: (address, theirs.rkey()), ..good })?;
    }
    let nothing = world.request(Operation::Write, 0, 0);
    world.refused(
        "another key, and no byte",
        Request { remote: (nothing.remote.0, nothing.remote.1 ^ 1), ..nothing },
    )
}

fn atomics(world: &World) -> Result<(), Error> {
    let (offset, at) = (PAGE, REGISTERED.start + PAGE);
    world.remote.memory.write(at, &41_u64.to_le_bytes());
    for (operation, before, after) in [
        (Operation::FetchAdd(1), 41_u64, 42_u64),
        (Operation::CompareSwap(42, 7), 42, 7),
        (Operation::CompareSwap(42, 8), 7, 7),
    ] {
        world.run("an aligned word", world.request(operation, offset, 8), || {
            let brought = world.local_bytes(8) == before.to_le_bytes();
            let left = world.remote_bytes(offset, 8) == after.to_le_bytes();
            if brought && left { "as sent" } else { "something else" }
        })?;
    }
    world.remote.memory.drop_pages(0..4 * PAGE).map_err(|error| Error::Call("madvise", error))?;
    world.run("a word of a dropped page", world.request(Operation::FetchAdd(1), offset, 8), || {
        compare(&world.remote_bytes(offset, 8), &[("as sent", &1_u64.to_le_bytes())])
    })?;
    world.refused("a word that is not aligned", world.request(Operation::FetchAdd(1), offset + 4, 8))
}

fn sends(world: &World) -> Result<(), Error> {
    let request = world.request(Operation::Send, 0, 300);
    let into = |length| (world.remote.address(), length, world.remote.rkey());
    for (seed, scenario, room) in
        [(5, "into room enough", 4096), (6, "into dropped pages", 300), (7, "into too little room", 100)]
    {
        world.local.memory.write(REGISTERED.start, &pattern(seed, 300));
        if room == 300 {
            world.remote.memory.drop_pages(0..2 * PAGE).map_err(|error| Error::Call("madvise", error))?;
        }
        let (requester, responder) = Queue::pair(&world.domain, RNR_FOR_EVER)?;
        let before = world.remote_bytes(0, 300);
        responder.receive(into(room))?;
        let sent = requester.run(request);
        let received = responder.completion();
        let candidates: [(_, &[u8]); 2] = [("as sent", &world.local_bytes(300)), ("as before", &before)];
        let bytes = Some(compare(&world.remote_bytes(0, 300), &candidates));
        world.line(scenario, "requester", request).complete(sent).print();
        Line { bytes, ..world.line(scenario, "responder", request).complete(received) }.print();
    }
    let (requester, _responder) = Queue::pair(&world.domain, 0)?;
    let sent = requester.run(request);
    world.line("into nothing, tried once", "requester", request).complete(sent).print();
    Ok(())
}

/// What the memory itself forbids.
fn forbidden(world: &World) -> Result<(), Error> {
    let (pages, offset) = (2 * PAGE..4 * PAGE, PAGE);
    let before = world.remote_bytes(offset, 100);
    world.remote.memory.protect(pages.clone(), false).map_err(|error| Error::Call("mprotect", error))?;
    world.read("read-only pages", offset, &[("as there", &before)])?;
    world.write("read-only pages", offset, 100)?;
    world.remote.memory.make_inaccessible(pages).map_err(|error| Error::Call("mmap", error))?;
    // The processor cannot look there any more: only what the device says counts.
    world.run("inaccessible pages", world.request(Operation::Write, offset, 100), || "not looked at")?;
    world.run("inaccessible pages", world.request(Operation::Read, offset, 100), || "not looked at")
}

fn registrations(world: &World) -> Result<(), Error> {
    let memory = Rc::new(Memory::new(PAGES).map_err(|error| Error::Call("mmap", error))?);
    memory.make_inaccessible(0..2 * PAGE).map_err(|error| Error::Call("mmap", error))?;
    let whole = 2 * PAGE..PAGES * PAGE;
    let tries = [
        ("register: a range never touched", whole.clone(), access::ALL),
        ("register: no byte", PAGE * 4..PAGE * 4, access::ALL),
        ("register: remote write without local write", whole.clone(), access::REMOTE_WRITE),
        ("register: read only", whole, access::REMOTE_READ),
        ("register: inaccessible pages", 0..2 * PAGE, access::ALL),
        ("register: partly inaccessible", PAGE..3 * PAGE, access::ALL),
    ];
    for (scenario, range, flags) in tries {
        let status = match Region::new(&world.domain, &memory, range, flags | world.flags) {
            Ok(_) => "registered".into(),
            Err(Error::Call(_, error)) => report::error(&error),
            Err(error) => return Err(error),
        };
        Line { scenario, region: world.kind, status, ..Line::default() }.print();
    }
    Ok(())
}

fn run() -> Result<(), Error> {
    let name = std::env::var("ANYPAGE_LAB_DEVICE").unwrap_or("rxe0".into());
    let gid_index =
        std::env::var("ANYPAGE_LAB_GID_INDEX").ok().and_then(|index| index.parse().ok()).unwrap_or(1);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let header = Header { kernel: kernel.trim(), device: &name };
    println!("{}", serde_json::to_string(&header).expect("strings only"));

    let device = Device::open(&name, gid_index)?;
    for (kind, flags) in [("pinned", 0), ("on demand", access::ON_DEMAND)] {
        let new = || World::new(&device, kind, flags);
        registrations(&new()?)?;
        transfers(&new()?)?;
        inside_pages(&new()?)?;
        untouched(&new()?, &device)?;
        dropped(&new()?)?;
        atomics(&new()?)?;
        sends(&new()?)?;
        forbidden(&new()?)?;
        keys(&new()?, &device)?;
    }
    Ok(())
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("oracle: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
