package chaos

import (
	"context"
	"fmt"
	"math/rand"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"

	"skein.io/skein/test/store/chaos/history"
)

// stream is a stream of watches whose responses are recorded.
type stream struct {
	n       *node
	rpc     pb.Watch_WatchClient
	watches map[int64]*history.Watch
	cancel  context.CancelFunc
}

func (n *node) openStream(ctx context.Context, shard string, needLeader bool) (*stream, error) {
	ctx, cancel := context.WithCancel(ctx)
	if needLeader {
		ctx = metadata.AppendToOutgoingContext(ctx, rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader)
	}
	rpc, err := pb.NewWatchClient(n.conn(shard)).Watch(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	return &stream{n: n, rpc: rpc, watches: map[int64]*history.Watch{}, cancel: cancel}, nil
}

// watch asks for a watch under an ID of its own.
func (s *stream) watch(id int64, w *history.Watch) error {
	w.Node, w.Life, w.Opened = s.n.name, int(s.n.life.Load()), s.n.w.hist.Now()
	s.watches[id] = w
	q := &pb.WatchCreateRequest{WatchId: id, Key: []byte(w.Key), RangeEnd: ends(w.End), StartRevision: w.Start,
		PrevKv: w.PrevKV, Fragment: w.Fragment, ProgressNotify: w.Progress}
	if w.NoPut {
		q.Filters = append(q.Filters, pb.WatchCreateRequest_NOPUT)
	}
	if w.NoDel {
		q.Filters = append(q.Filters, pb.WatchCreateRequest_NODELETE)
	}
	return s.rpc.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: q}})
}

func (s *stream) askProgress() error {
	return s.rpc.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
}

// receive one response; it returns the watch that it is for, nil for all.
func (s *stream) receive() (*history.Watch, *history.WatchMessage, error) {
	r, err := s.rpc.Recv()
	if err != nil {
		return nil, nil, err
	}
	m := history.WatchMessage{At: s.n.w.hist.Now(), Rev: r.Header.Revision, Created: r.Created, Canceled: r.Canceled,
		CompactRevision: r.CompactRevision, Reason: r.CancelReason, Fragment: r.Fragment, All: r.WatchId == clientv3.InvalidWatchID}
	for _, e := range r.Events {
		m.Events = append(m.Events, event(e))
	}
	if m.All && m.Canceled {
		return nil, nil, fmt.Errorf("a watch was refused: %s", m.Reason)
	}
	if m.All {
		for _, w := range s.watches {
			w.Messages = append(w.Messages, m)
		}
		return nil, &m, nil
	}
	w := s.watches[r.WatchId]
	if w == nil {
		return nil, nil, fmt.Errorf("a response for watch %d, which does not exist", r.WatchId)
	}
	w.Messages = append(w.Messages, m)
	return w, &m, nil
}

// close ends the stream and records its watches.
func (s *stream) close() {
	s.cancel()
	for _, w := range s.watches {
		w.Closed = s.n.w.hist.Now()
		s.n.w.hist.AddWatch(w)
	}
}

// mainWatch sees everything on one node, from the beginning to the end: it begins
// anew where it was whenever its stream ends.
type mainWatch struct {
	n     *node
	shard string
	next  int64
	seen  atomic.Int64 // revision up to which it has everything
}

func (m *mainWatch) run(ctx context.Context) {
	for ctx.Err() == nil {
		m.once(ctx)
		select {
		case <-ctx.Done():
		case <-time.After(30 * time.Millisecond):
		}
	}
}

func (m *mainWatch) once(ctx context.Context) {
	s, err := m.n.openStream(ctx, m.shard, true)
	if err != nil {
		return
	}
	defer s.close()
	w := &history.Watch{Shard: m.shard, Key: prefixes[m.shard], End: prefixEnd(prefixes[m.shard]), Whole: true,
		Start: m.next, PrevKV: true, Progress: true}
	if s.watch(1, w) != nil {
		return
	}
	for {
		_, msg, err := s.receive()
		if err != nil {
			return
		}
		if msg.CompactRevision != 0 {
			m.next = msg.CompactRevision // what was between is not to be had here any more
			return
		}
		if msg.Created && !msg.All {
			continue
		}
		at := msg.Rev
		if len(msg.Events) > 0 {
			at = msg.Events[len(msg.Events)-1].KV.Mod
		}
		if at >= m.next {
			m.next = at + 1
			m.seen.Store(at)
		}
	}
}

// roam opens streams with watches of all kinds, for a moment each.
func (l *load) roam(shard string, slow bool, r *rand.Rand) {
	for l.pause(r, 100*time.Millisecond) {
		l.roamOnce(shard, slow, r)
	}
}

func (l *load) roamOnce(shard string, slow bool, r *rand.Rand) {
	ctx, cancel := context.WithTimeout(l.ctx, 300*time.Millisecond+time.Duration(r.Int63n(int64(4*time.Second))))
	defer cancel()
	s, err := l.anyNode(r).openStream(ctx, shard, r.Intn(2) == 0)
	if err != nil {
		return
	}
	defer s.close()
	for id := range int64(1 + r.Intn(4)) {
		if s.watch(id+1, l.anyWatch(shard, slow, r)) != nil {
			return
		}
	}
	asks := r.Intn(2) == 0
	done := make(chan struct{})
	defer func() { cancel(); <-done }()
	go func() {
		defer close(done)
		for asks && ctx.Err() == nil { // Send may run beside Recv
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
				_ = s.askProgress() // the stream may have ended
			}
		}
	}()
	for {
		if slow {
			select {
			case <-ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
		if _, _, err := s.receive(); err != nil {
			return
		}
		select {
		case <-l.stop:
			return
		default:
		}
	}
}

// anyWatch of a key, a group or all, from the past, now or the future.
func (l *load) anyWatch(shard string, all bool, r *rand.Rand) *history.Watch {
	p := prefixes[shard]
	group := fmt.Sprintf("%s%d/", p, r.Intn(l.t.groups))
	w := &history.Watch{Shard: shard, PrevKV: r.Intn(2) == 0, Fragment: r.Intn(3) == 0, Progress: r.Intn(2) == 0, NoPut: r.Intn(6) == 0}
	w.NoDel = !w.NoPut && r.Intn(6) == 0
	switch d := r.Intn(3); {
	case all || d == 0:
		w.Key, w.End = p, prefixEnd(p)
	case d == 1:
		w.Key, w.End = group, prefixEnd(group)
	default:
		w.Key = fmt.Sprintf("%s%c", group, 'a'+r.Intn(keysPerGroup))
	}
	var now int64
	for _, m := range l.mains {
		if m.shard == shard {
			now = max(now, m.seen.Load())
		}
	}
	switch r.Intn(5) {
	case 0: // now
	case 1:
		w.Start = now + r.Int63n(200) + 1
	default:
		w.Start = max(1, now-r.Int63n(400))
	}
	return w
}
