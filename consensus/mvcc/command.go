package mvcc

import (
	"encoding/binary"
	"errors"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// commandVersion is the first byte of every command in the log but batches (batch.go). Whoever adds
// a kind of command, or makes one do something else, raises it for that kind alone, together with
// identity.ProtocolLevel, and proposes it only once every member announces that level: the
// others write what all understand. A replica that meets a newer version, or a kind that
// it does not know, stops, since leaving out what others apply would let them drift apart.
const (
	commandVersion byte = 1
	newestVersion       = batchVersion
)

// Kind says what a command does.
type Kind byte

// The kinds of commands. The numbers are on disk.
const (
	// KindRequest is an etcd request.
	KindRequest Kind = 1
	// KindLeader opens the epoch of a new leader of this shard.
	KindLeader Kind = 2
	// KindFence raises the term of the cluster's leader.
	KindFence Kind = 3
	// KindHold makes the shard refuse requests until the hold is released, so that
	// a backup can cut all shards at one moment.
	KindHold Kind = 4
	// KindRelease ends a hold.
	KindRelease Kind = 5
)

// Command is one entry of the log, decoded:
//
//	version:1 kind:1 epoch:uvarint term:uvarint InternalRaftRequest   KindRequest
//	version:1 kind:1 term:uvarint  replica:uvarint                    KindLeader
//	version:1 kind:1 term:uvarint                                     KindFence
//	version:1 kind:1 epoch:uvarint hold:uvarint InternalRaftRequest   KindHold, KindRelease
type Command struct {
	Kind Kind
	// Epoch of a request or hold: the newest Leader term that its proposer had applied.
	Epoch uint64
	// Term of a request: the cluster leader's term that it acts for, 0 for none.
	// Of the other kinds: the term they announce.
	Term uint64
	// Replica that leads, of KindLeader.
	Replica uint64
	// Hold is the ID of a hold, not 0.
	Hold uint64
	// Request of KindRequest; its Header.ID finds the waiter. Of KindHold and
	// KindRelease it is the header alone.
	Request *pb.InternalRaftRequest
}

func (c Command) requestID() uint64 {
	if c.Request == nil || c.Request.Header == nil {
		return 0
	}
	return c.Request.Header.ID
}

var (
	// ErrBadCommand is the result of a command that cannot be decoded or asks for
	// something impossible. Such a command changes nothing.
	ErrBadCommand = errors.New("mvcc: malformed command")
	// ErrNewerCommand is returned for a command of a version or kind above ours. It is
	// the one case in which a replica must stop: skipping what newer members
	// apply would let the replicas drift apart.
	ErrNewerCommand = errors.New("mvcc: command of a newer version than this binary knows")
)

// Encode returns the command's bytes. It fails only if the request cannot be
// marshalled.
func (c Command) Encode() ([]byte, error) {
	head := 2 + 2*binary.MaxVarintLen64
	size := 0
	if c.Request != nil {
		size = c.Request.Size()
	}
	buf := make([]byte, 2, head+size)
	buf[0], buf[1] = commandVersion, byte(c.Kind)
	switch c.Kind {
	case KindRequest, KindHold, KindRelease:
		buf = binary.AppendUvarint(buf, c.Epoch)
		if c.Kind == KindRequest {
			buf = binary.AppendUvarint(buf, c.Term)
		} else {
			buf = binary.AppendUvarint(buf, c.Hold)
		}
		off := len(buf)
		n, err := c.Request.MarshalTo(buf[off : off+size])
		if err != nil {
			return nil, fmt.Errorf("mvcc: encode request %d: %w", c.requestID(), err)
		}
		return buf[:off+n], nil
	case KindLeader:
		buf = binary.AppendUvarint(buf, c.Term)
		return binary.AppendUvarint(buf, c.Replica), nil
	case KindFence:
		return binary.AppendUvarint(buf, c.Term), nil
	}
	return nil, fmt.Errorf("%w: cannot encode kind %d", ErrBadCommand, c.Kind)
}

// Decode is the inverse of Encode. Its errors are ErrBadCommand and
// ErrNewerCommand. It does not keep b.
func Decode(b []byte) (Command, error) {
	if len(b) < 2 {
		return Command{}, fmt.Errorf("%w: %d bytes", ErrBadCommand, len(b))
	}
	if b[0] > newestVersion {
		return Command{}, fmt.Errorf("%w: version %d, known is %d; upgrade this node", ErrNewerCommand, b[0], newestVersion)
	}
	if b[0] != commandVersion {
		return Command{}, fmt.Errorf("%w: version %d", ErrBadCommand, b[0])
	}
	c := Command{Kind: Kind(b[1])}
	b = b[2:]
	next := func(v *uint64) bool {
		n := 0
		*v, n = binary.Uvarint(b)
		if n <= 0 {
			return false
		}
		b = b[n:]
		return true
	}
	switch c.Kind {
	case KindRequest, KindHold, KindRelease:
		second := &c.Term
		if c.Kind != KindRequest {
			second = &c.Hold
		}
		if !next(&c.Epoch) || !next(second) {
			return Command{}, fmt.Errorf("%w: truncated request", ErrBadCommand)
		}
		if c.Kind != KindRequest && c.Hold == 0 {
			return Command{}, fmt.Errorf("%w: hold 0", ErrBadCommand)
		}
		c.Request = &pb.InternalRaftRequest{}
		if err := c.Request.Unmarshal(b); err != nil {
			return Command{}, fmt.Errorf("%w: %v", ErrBadCommand, err)
		}
	case KindLeader:
		if !next(&c.Term) || !next(&c.Replica) || len(b) != 0 {
			return Command{}, fmt.Errorf("%w: leader command", ErrBadCommand)
		}
	case KindFence:
		if !next(&c.Term) || len(b) != 0 {
			return Command{}, fmt.Errorf("%w: fence command", ErrBadCommand)
		}
	case 0:
		return Command{}, fmt.Errorf("%w: kind 0", ErrBadCommand)
	default:
		return Command{}, fmt.Errorf("%w: kind %d; upgrade this node", ErrNewerCommand, c.Kind)
	}
	return c, nil
}
