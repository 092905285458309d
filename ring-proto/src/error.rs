//! What a peer can do wrong with the ring itself.

/// The peer moved an index to an impossible value. Nothing on the ring can be trusted any more: stop
/// the ring and its device, and nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RingError {
    /// More requests than the ring has slots, or `req_prod` went backwards.
    #[error("req_prod {req_prod} is not within {slots} slots of {rsp_prod} responses")]
    RequestOverrun {
        /// As the frontend wrote it.
        req_prod: u32,
        /// Responses we have pushed.
        rsp_prod: u32,
        /// Slots in the ring.
        slots: u32,
    },
    /// Responses to requests that were not made, or `rsp_prod` went backwards.
    #[error(
        "rsp_prod {rsp_prod} is not between the {taken} responses taken and the {pushed} requests made"
    )]
    ResponseOverrun {
        /// As the backend wrote it.
        rsp_prod: u32,
        /// Responses we have taken.
        taken: u32,
        /// Requests we have pushed.
        pushed: u32,
    },
}

/// There is no free slot. Take responses first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the ring is full")]
pub struct RingFull;
