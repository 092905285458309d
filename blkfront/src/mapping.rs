//! Which vCPU uses which ring, as blk-mq maps software to hardware queues.

/// The ring of each vCPU.
///
/// With as many rings as vCPUs: one to one. With fewer rings, neighbours share one, as evenly as possible
/// (`group_cpus_evenly` in Linux). With more, in sequence, and the rest stay idle.
///
/// ```
/// assert_eq!(blkfront::map_vcpus(4, 4), [0, 1, 2, 3]);
/// assert_eq!(blkfront::map_vcpus(5, 2), [0, 0, 0, 1, 1]);
/// assert_eq!(blkfront::map_vcpus(2, 4), [0, 1]);
/// ```
pub fn map_vcpus(vcpus: u32, rings: u32) -> Vec<u32> {
    if rings == 0 {
        return Vec::new();
    }
    let place = |vcpu: u32| u64::from(vcpu) * u64::from(rings) / u64::from(vcpus);
    (0..vcpus).map(|v| if vcpus <= rings { v } else { place(v) as u32 }).collect()
}

#[cfg(test)]
mod tests {
    use super::map_vcpus;

    #[test]
    fn every_ring_is_used_evenly_and_in_order() {
        for vcpus in 1..=64u32 {
            for rings in 1..=64u32 {
                let map = map_vcpus(vcpus, rings);
                assert_eq!(map.len(), vcpus as usize);
                assert!(map.is_sorted());
                let users = |ring| map.iter().filter(|&&r| r == ring).count() as u32;
                for ring in 0..rings {
                    let fair = vcpus / rings..=vcpus.div_ceil(rings);
                    assert!(fair.contains(&users(ring)), "{vcpus} vCPUs, {rings} rings: {map:?}");
                }
            }
        }
        assert_eq!(map_vcpus(4, 4), [0, 1, 2, 3]);
        assert_eq!(map_vcpus(8, 3), [0, 0, 0, 1, 1, 1, 2, 2]);
        assert_eq!(map_vcpus(2, 4), [0, 1]);
        assert!(map_vcpus(1, 0).is_empty());
    }
}
