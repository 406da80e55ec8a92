//! A program on the crate `ibverbs`: a queue pair that is connected to itself and sends to itself.
//!
//! Unsafe island. Invariant: a region is neither moved nor freed while requests over it are under way: each round waits for
//! both of its completions.
#![allow(unsafe_code)]

use ibverbs::{ibv_qp_type, ibv_wc};
use std::error::Error;

const ROUNDS: u64 = 100;
const SENT: u64 = 1;
const RECEIVED: u64 = 2;

fn main() -> Result<(), Box<dyn Error>> {
    let devices = ibverbs::devices()?;
    let device = devices.iter().next().ok_or("there is no RDMA device")?.open()?;
    let cq = device.create_cq(16, 0)?;
    let pd = device.alloc_pd()?;
    let prepared = pd.create_qp(&cq, &cq, ibv_qp_type::IBV_QPT_RC).set_gid_index(0).build()?;
    let endpoint = prepared.endpoint();
    let mut qp = prepared.handshake(endpoint)?;
    let mut region = pd.allocate::<u64>(2)?;
    for round in 0..ROUNDS {
        region[1] = round + 7;
        // SAFETY: as this file says.
        unsafe { qp.post_receive(&mut region, ..1, RECEIVED) }?;
        // SAFETY: as this file says.
        unsafe { qp.post_send(&mut region, 1.., SENT) }?;
        let mut ended = Vec::new();
        let mut completions = [ibv_wc::default(); 4];
        while ended.len() < 2 {
            for completion in cq.poll(&mut completions)? {
                if let Some((status, _)) = completion.error() {
                    return Err(format!("request {}: status {status}", completion.wr_id()).into());
                }
                ended.push(completion.wr_id());
            }
        }
        ended.sort_unstable();
        if ended != [SENT, RECEIVED] || region[0] != round + 7 {
            return Err(format!("round {round}: {ended:?} ended, {} arrived", region[0]).into());
        }
    }
    println!("{ROUNDS} messages sent and received");
    Ok(())
}
