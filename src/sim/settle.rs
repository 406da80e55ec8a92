//! The end of a run: everything that was begun ends, every byte is looked at, everything is given back.

use super::Broken;
use super::memory::Piece;
use super::network::Weather;
use super::world::{Dev, World};
use hw_model::addr::VirtAddr;
use hw_model::hca::LiveObjects;
use hw_model::sync::Arc;

/// Rounds in which everything moves by a step; far more than anything takes.
const MOST_ROUNDS: usize = 50_000;

impl World {
    /// Brings the run to its end.
    ///
    /// # Errors
    /// [`Broken`] if something does not come to rest, is not what it must be, or is left over.
    pub fn settle(&mut self) -> Result<(), Broken> {
        self.choices.next_step();
        self.note(|| "the end: nothing new is begun".to_owned());
        self.network.weather = Weather::default();
        self.rest()?;
        for index in 0..self.connections.len() {
            self.reconnect(index)?;
        }
        self.rest()?;
        if self.memory.transfers() > 0 {
            let detail = format!("{} transfers are still followed", self.memory.transfers());
            return Err(Broken { rule: "every request ends once", detail });
        }
        self.check_everything()?;
        self.check_hosts()?;
        self.read_everything()?;
        while !self.regions.is_empty() {
            self.deregister(0);
        }
        while !self.wholes.is_empty() {
            self.deregister_implicit(0);
        }
        self.rest()?;
        self.read_everything()?;
        self.give_back()
    }

    fn check_hosts(&self) -> Result<(), Broken> {
        self.hosts.iter().try_for_each(|host| {
            host.sim.check().map_err(|error| Broken::new("the host agrees with itself", error))
        })
    }

    /// Steps everything until nothing moves any more.
    fn rest(&mut self) -> Result<(), Broken> {
        for _ in 0..MOST_ROUNDS {
            if self.round()? {
                continue;
            }
            if self.is_at_rest() {
                return Ok(());
            }
            self.wait();
        }
        let detail = format!(
            "requests {:?}; {} changes, {} registrations, {} pieces of advice, {} teardowns; engines asleep: {:?}; faults: {:?}",
            self.requests.keys().collect::<Vec<_>>(),
            self.changes.len() + self.buffer_changes.len(),
            self.registrations.len(),
            self.advices.len(),
            self.teardowns.len(),
            self.devices.iter().map(|dev| dev.asleep).collect::<Vec<_>>(),
            self.devices
                .iter()
                .map(|dev| (dev.jobs.len(), dev.device.hca().faults().len()))
                .collect::<Vec<_>>(),
        );
        Err(Broken { rule: "everything ends", detail })
    }

    fn is_at_rest(&self) -> bool {
        self.requests.is_empty()
            && self.network.is_empty()
            && self.changes.is_empty()
            && self.buffer_changes.is_empty()
            && self.registrations.is_empty()
            && self.reregs.is_empty()
            && self.leaving.is_empty()
            && self.advices.is_empty()
            && self.teardowns.is_empty()
            && self.retired.is_empty()
            && self
                .devices
                .iter()
                .all(|dev| !dev.has_faults() && dev.prefetches.is_empty() && !dev.device.reclaim())
    }

    /// A step of everything; whether anything moved.
    fn round(&mut self) -> Result<bool, Broken> {
        let mut moved = self.deliver_all();
        for device in 0..self.devices.len() {
            let due = match self.devices[device].asleep {
                None => true,
                Some(wake_at) => wake_at.is_some_and(|at| at <= self.now),
            };
            if due {
                self.step_engine(device)?;
                moved |= self.devices[device].asleep.is_none();
            }
            moved |= self.take_fault(device);
            for job in (0..self.devices[device].jobs.len()).rev() {
                moved |= self.step_fault(device, job);
            }
            moved |= self.take_prefetch(device);
            for job in (0..self.devices[device].prefetches.len()).rev() {
                moved |= self.step_prefetch(device, job);
            }
        }
        for host in &self.hosts {
            host.sim.poll_parked();
        }
        for index in (0..self.changes.len()).rev() {
            moved |= self.step_change(index)?;
        }
        for index in (0..self.buffer_changes.len()).rev() {
            // A revocation that ends takes migrations with it.
            if index < self.buffer_changes.len() {
                moved |= self.step_buffer_change(index)?;
            }
        }
        for index in (0..self.registrations.len()).rev() {
            moved |= self.step_registration(index)?;
        }
        for index in (0..self.reregs.len()).rev() {
            moved |= self.step_rereg(index)?;
        }
        for index in (0..self.leaving.len()).rev() {
            moved |= self.step_leaving(index);
        }
        for index in (0..self.advices.len()).rev() {
            moved |= self.step_advice(index);
        }
        for index in (0..self.teardowns.len()).rev() {
            moved |= self.step_teardown(index);
        }
        self.finish_retired();
        Ok(moved)
    }

    /// Every page of every process.
    fn read_everything(&mut self) -> Result<(), Broken> {
        for process in self.living(None).into_iter().chain(self.buffers()) {
            let pages: Vec<u64> = self.memory.pages(process).map(|(page, _)| page).collect();
            for page in pages {
                self.read(Piece { process, at: VirtAddr::from_page_number(page), len: 4096 })?;
            }
        }
        Ok(())
    }

    /// Everything is given back, and nothing is left of it.
    fn give_back(&mut self) -> Result<(), Broken> {
        self.check_buffers()?;
        self.count_devices();
        self.pins.clear();
        self.connections.clear();
        self.aliases.clear();
        let mut hcas = Vec::new();
        for (index, dev) in std::mem::take(&mut self.devices).into_iter().enumerate() {
            let Dev { device, pd, cq, .. } = dev;
            drop((pd, cq));
            let live = device.hca().live_objects();
            if live != LiveObjects::default() {
                return Err(Broken { rule: "nothing is left", detail: format!("device {index}: {live:?}") });
            }
            let iova = device.dma().iova_stats();
            if (iova.live_ranges, iova.live_bytes) != (0, 0) && device.dma().domain().is_some() {
                return Err(Broken { rule: "nothing is left", detail: format!("device {index}: {iova:?}") });
            }
            let mapped = device.dma().domain().map_or(0, |domain| domain.stats().mapped_bytes);
            if mapped > 0 {
                let detail = format!("device {index}: {mapped:#x} bytes are mapped");
                return Err(Broken { rule: "nothing is left", detail });
            }
            hcas.push(device);
        }
        for process in self.living(None) {
            let count = self.processes[process].space.as_ref().map_or(0, Arc::strong_count);
            if count != 1 {
                let detail = format!("process {process} is held {count} times");
                return Err(Broken { rule: "nothing is left", detail });
            }
            self.memory.end_process(process);
            drop(self.processes[process].space.take());
        }
        for (index, host) in self.hosts.iter().enumerate() {
            let stats = host.sim.stats();
            if (stats.processes, stats.parked, stats.swap_slots) != (0, 0, stats.swap_slots) {
                return Err(Broken { rule: "nothing is left", detail: format!("host {index}: {stats:?}") });
            }
        }
        self.check_hosts()
    }

    fn count_devices(&mut self) {
        let net = self.network.counts;
        self.counts.add("packets sent", net.sent);
        self.counts.add("packets lost", net.lost);
        self.counts.add("packets mangled", net.mangled);
        self.counts.add("packets delivered twice", net.doubled);
        self.counts.add("packets overtaken", net.overtaken);
        for dev in &self.devices {
            let stats = dev.device.hca().stats();
            self.counts.add("RNR NAKs", stats.rnr_naks_sent);
            self.counts.add("retries", stats.retries);
            self.counts.add("bytes placed", stats.bytes_placed);
            self.counts.add("injected failures", dev.injected());
            if let Some(domain) = dev.device.dma().domain() {
                self.counts.add("IOTLB flushes", domain.stats().iotlb.flushes);
            }
        }
        for process in self.living(None) {
            use odp::space::AddressSpace;
            let stats = self.space(process).notifiers().stats();
            self.counts.add("invalidations", stats.invalidations);
        }
    }
}
