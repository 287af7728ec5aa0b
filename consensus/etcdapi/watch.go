package etcdapi

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	etcdmvcc "go.etcd.io/etcd/server/v3/storage/mvcc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	// DefaultProgress is how often an idle watch that asked for it is told the
	// revision; etcd's default. Up to a tenth is added so that watches spread.
	DefaultProgress = 10 * time.Minute
	// fragmentSize is the size of a response from which on a watch that asked for
	// it gets it in parts; etcd's limit of a request with its overhead.
	fragmentSize = (1536 + 512) << 10
	// maxAnswers is how many answers to requests of one stream may wait: far more
	// than a client that reads them ever leaves. One that does not is cut off.
	maxAnswers = 1 << 16
)

type watchServer struct {
	r        Replica
	progress time.Duration
	keys     *keyGuard // nil in process
}

// NewWatch returns the Watch service of a replica. Idle watches that asked for it
// are told the revision every `progress`.
func NewWatch(r Replica, progress time.Duration) pb.WatchServer {
	return &watchServer{r: r, progress: progress}
}

// Watch serves one stream until the client ends it, the replica stops, or, if
// the client requires a leader, the replica is cut off.
func (s *watchServer) Watch(stream pb.Watch_WatchServer) error {
	if requiresLeader(stream.Context()) && s.cutOff() {
		return rpctypes.ErrGRPCNoLeader
	}
	events, err := s.r.Machine().NewWatchStream()
	if err != nil {
		return rpctypes.ErrGRPCNoLeader
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	w := &watchStream{
		r: s.r, keys: s.keys, stream: stream, ctx: ctx, events: events, wake: make(chan struct{}, 1),
		options: map[etcdmvcc.WatchID]*watchOptions{}, progress: s.progress,
	}
	var wg sync.WaitGroup
	wg.Go(func() { cancel(w.send()) })
	if requiresLeader(ctx) {
		wg.Go(func() {
			if s.leaderLost(ctx) {
				cancel(rpctypes.ErrGRPCNoLeader)
			}
		})
	}
	// The receiver is not waited for: it may be blocked in Recv until after this
	// method has returned, which is what ends the stream.
	go func() {
		if err := w.receive(); err != nil {
			cancel(err)
		}
	}()
	select {
	case <-ctx.Done():
	case <-s.r.Done():
		cancel(rpctypes.ErrGRPCNoLeader)
	}
	w.close()
	wg.Wait()
	err = context.Cause(ctx)
	if errors.Is(err, context.Canceled) {
		return rpctypes.ErrGRPCWatchCanceled
	}
	return err
}

func (s *watchServer) cutOff() bool { return s.r.SinceContact() > cutOff*s.r.ElectionTimeout() }

// leaderLost returns true when the replica has been cut off, false when ctx ends.
func (s *watchServer) leaderLost(ctx context.Context) bool {
	t := time.NewTicker(s.r.ElectionTimeout() / 2)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
			if s.cutOff() {
				return true
			}
		}
	}
}

// requiresLeader reports clientv3.WithRequireLeader. In process the client's
// context is the server's, so the flag is still outgoing metadata there.
func requiresLeader(ctx context.Context) bool {
	if clientRequiresLeader(ctx) {
		return true
	}
	md, _ := metadata.FromOutgoingContext(ctx)
	v := md.Get(rpctypes.MetadataRequireLeaderKey)
	return len(v) > 0 && v[0] == rpctypes.MetadataHasLeader
}

// clientRequiresLeader is requiresLeader for a request that came over the network; it is asked for
// each and must not copy the metadata.
func clientRequiresLeader(ctx context.Context) bool {
	v := metadata.ValueFromIncomingContext(ctx, rpctypes.MetadataRequireLeaderKey)
	return len(v) > 0 && v[0] == rpctypes.MetadataHasLeader
}

// watchOptions are what a watch asked for besides its keys.
type watchOptions struct {
	prevKV, fragment bool
	// progress: notifications were asked for. quiet: nothing has been sent since
	// the last tick, so one is due.
	progress, quiet bool
}

// watchStream is one client's stream with its watches. receive answers requests
// by way of answers, send alone writes to the client: it interleaves those
// answers with the events so that a watch's creation comes before its events.
//
// receive never waits for send. etcd's client reads nothing while it sends a
// request, and in process nothing lies between the two: if the server also read
// nothing while it cannot send, the end of many watches at once would stop the
// stream, and with it every watch of the client, for ever.
type watchStream struct {
	r        Replica
	keys     *keyGuard
	stream   pb.Watch_WatchServer
	ctx      context.Context
	events   etcdmvcc.WatchStream
	wake     chan struct{} // there are answers
	progress time.Duration

	mu      sync.Mutex // guards the rest
	options map[etcdmvcc.WatchID]*watchOptions
	closed  bool
	// answers wait to be sent, at most maxAnswers.
	answers []*pb.WatchResponse
}

// close makes the store forget the watches; events is not used after it.
func (w *watchStream) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.events.Close()
}

// receive returns nil when the client asks for nothing more; it may still want what it
// has asked for.
func (w *watchStream) receive() error {
	for {
		q, err := w.stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		var answer *pb.WatchResponse
		switch v := q.RequestUnion.(type) {
		case *pb.WatchRequest_CreateRequest:
			if v.CreateRequest != nil {
				answer = w.create(v.CreateRequest)
			}
		case *pb.WatchRequest_CancelRequest:
			if v.CancelRequest != nil {
				answer = w.cancel(etcdmvcc.WatchID(v.CancelRequest.WatchId))
			}
		case *pb.WatchRequest_ProgressRequest:
			if v.ProgressRequest != nil {
				w.requestProgress()
			}
		}
		if answer != nil && !w.answer(answer) {
			return rpctypes.ErrGRPCRequestTooManyRequests
		}
	}
}

// answer puts an answer in the queue; false when that is full.
func (w *watchStream) answer(a *pb.WatchResponse) bool {
	w.mu.Lock()
	if len(w.answers) >= maxAnswers {
		w.mu.Unlock()
		return false
	}
	w.answers = append(w.answers, a)
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
	return true
}

func (w *watchStream) takeAnswers() []*pb.WatchResponse {
	w.mu.Lock()
	defer w.mu.Unlock()
	a := w.answers
	w.answers = nil
	return a
}

func filters(q *pb.WatchCreateRequest) (out []etcdmvcc.FilterFunc) {
	for _, f := range q.Filters {
		switch f {
		case pb.WatchCreateRequest_NOPUT:
			out = append(out, func(e mvccpb.Event) bool { return e.Type == mvccpb.PUT })
		case pb.WatchCreateRequest_NODELETE:
			out = append(out, func(e mvccpb.Event) bool { return e.Type == mvccpb.DELETE })
		}
	}
	return out
}

func (w *watchStream) create(q *pb.WatchCreateRequest) *pb.WatchResponse {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	refuse := func(reason error) *pb.WatchResponse {
		return &pb.WatchResponse{Header: header(w.r, w.events.Rev()), WatchId: clientv3.InvalidWatchID,
			Created: true, Canceled: true, CancelReason: reason.Error()}
	}
	if q.StartRevision < 0 {
		return refuse(rpctypes.ErrCompacted)
	}
	if w.keys != nil {
		if err := w.keys.check(q.Key, q.RangeEnd); err != nil {
			return refuse(errors.New(status.Convert(err).Message()))
		}
	}
	key, end := q.Key, q.RangeEnd
	if len(key) == 0 {
		key = []byte{0} // the smallest key
	}
	switch {
	case len(end) == 0:
		end = nil // one key
	case len(end) == 1 && end[0] == 0:
		end = []byte{} // every key from key on
	}
	id, err := w.events.Watch(etcdmvcc.WatchID(q.WatchId), key, end, q.StartRevision, filters(q)...)
	if err != nil {
		return refuse(err)
	}
	w.options[id] = &watchOptions{prevKV: q.PrevKv, fragment: q.Fragment, progress: q.ProgressNotify, quiet: true}
	return &pb.WatchResponse{Header: header(w.r, w.events.Rev()), WatchId: int64(id), Created: true}
}

func (w *watchStream) cancel(id etcdmvcc.WatchID) *pb.WatchResponse {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || w.events.Cancel(id) != nil {
		return nil // there is no such watch; etcd does not answer either
	}
	delete(w.options, id)
	return &pb.WatchResponse{Header: header(w.r, w.events.Rev()), WatchId: int64(id), Canceled: true}
}

// requestProgress answers the client's request with one notification for all
// watches, if they have all received everything; the client asks again otherwise.
func (w *watchStream) requestProgress() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		w.events.RequestProgressAll()
	}
}

// tick asks for a notification for every watch that wants them and was quiet.
func (w *watchStream) tick() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	for id, o := range w.options {
		if o.progress && o.quiet {
			w.events.RequestProgress(id)
		}
		o.quiet = true
	}
}

func (w *watchStream) optionsOf(id etcdmvcc.WatchID, events int) watchOptions {
	w.mu.Lock()
	defer w.mu.Unlock()
	o := w.options[id]
	if o == nil {
		return watchOptions{}
	}
	if events > 0 {
		o.quiet = false
	}
	return *o
}

// send writes to the client until the stream ends or a write fails.
func (w *watchStream) send() error {
	announced := map[int64]bool{}
	early := map[int64][]etcdmvcc.WatchResponse{} // of watches not announced yet
	interval := w.progress + rand.N(w.progress/10+1)
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	defer func() { // keep etcd's gauge of pending events right
		for e := range w.events.Chan() {
			etcdmvcc.ReportEventReceived(len(e.Events))
		}
		for _, es := range early {
			for _, e := range es {
				etcdmvcc.ReportEventReceived(len(e.Events))
			}
		}
	}()
	sendAnswers := func() error {
		for _, c := range w.takeAnswers() {
			if err := w.stream.Send(c); err != nil {
				return err
			}
			switch id := c.WatchId; {
			case id == clientv3.InvalidWatchID:
			case c.Canceled:
				delete(announced, id)
			case c.Created:
				announced[id] = true
				for _, e := range early[id] {
					if err := w.sendEvents(e); err != nil {
						return err
					}
				}
				delete(early, id)
			}
		}
		return nil
	}
	for {
		select {
		case e, ok := <-w.events.Chan():
			if !ok {
				return w.ctx.Err()
			}
			// A notification on behalf of all watches has the invalid ID. It comes after
			// the creations that were asked for before it.
			id := int64(e.WatchID)
			if id == clientv3.InvalidWatchID {
				if err := sendAnswers(); err != nil {
					return err
				}
			} else if !announced[id] {
				early[id] = append(early[id], e)
				continue
			}
			if err := w.sendEvents(e); err != nil {
				return err
			}
		case <-w.wake:
			if err := sendAnswers(); err != nil {
				return err
			}
		case <-ticker.C:
			w.tick()
		case <-w.ctx.Done():
			return context.Cause(w.ctx)
		}
	}
}

func (w *watchStream) sendEvents(e etcdmvcc.WatchResponse) error {
	etcdmvcc.ReportEventReceived(len(e.Events))
	o := w.optionsOf(e.WatchID, len(e.Events))
	resp := &pb.WatchResponse{
		Header: header(w.r, e.Revision), WatchId: int64(e.WatchID),
		CompactRevision: e.CompactRevision, Canceled: e.CompactRevision != 0,
		Events: make([]*mvccpb.Event, len(e.Events)),
	}
	for i := range e.Events {
		ev := &e.Events[i]
		created := ev.Type == mvccpb.PUT && ev.Kv.CreateRevision == ev.Kv.ModRevision
		if o.prevKV && !created {
			// A replica that is being stopped cannot tell; its client has to ask
			// another one, not to take the key for one that did not exist.
			var err error
			if ev.PrevKv, err = w.r.Machine().KeyAt(w.ctx, ev.Kv.Key, ev.Kv.ModRevision-1); err != nil {
				return rpctypes.ErrGRPCNoLeader
			}
		}
		resp.Events[i] = ev
	}
	if !o.fragment {
		return w.stream.Send(resp)
	}
	return sendFragments(resp, fragmentSize, w.stream.Send)
}

// sendFragments sends a response in parts of at most limit bytes, a part being
// at least one event. All but the last are marked.
func sendFragments(resp *pb.WatchResponse, limit int, send func(*pb.WatchResponse) error) error {
	events := resp.Events
	if len(events) < 2 || resp.Size() < limit {
		return send(resp)
	}
	head := *resp
	head.Events = nil
	empty := head.Size()
	for len(events) > 0 {
		part, size, n := head, empty, 0
		for n < len(events) {
			size += events[n].Size() + 8 // tag and length
			if n > 0 && size >= limit {
				break
			}
			n++
		}
		part.Events, events = events[:n:n], events[n:]
		part.Fragment = len(events) > 0
		if err := send(&part); err != nil {
			return err
		}
	}
	return nil
}
