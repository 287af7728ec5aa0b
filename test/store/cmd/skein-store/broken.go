package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"skein.io/skein/consensus/etcdapi"
	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/mvcc"
)

// Promises that can be broken, so that tests can show that breaking them is
// noticed. One request or response in `seldom` is concerned.
const (
	brokenStale      = "stale-read"      // linearizable reads do not ask the leader
	brokenLost       = "lost-write"      // a put is acknowledged and forgotten
	brokenDouble     = "double-apply"    // a put is executed twice
	brokenEarlyLease = "early-lease"     // leases end after a second
	brokenWatchDrop  = "watch-drop"      // a response with events is not sent
	brokenWatchTwice = "watch-duplicate" // a response with events is sent twice

	seldom = 20
)

func brokenModes() string {
	return strings.Join([]string{brokenStale, brokenLost, brokenDouble, brokenEarlyLease, brokenWatchDrop, brokenWatchTwice}, ", ")
}

type brokenReplica struct {
	etcdapi.Replica
	mode string
	n    atomic.Int64
}

func (b *brokenReplica) ReadIndex(ctx context.Context) error {
	if b.mode == brokenStale {
		return nil
	}
	return b.Replica.ReadIndex(ctx)
}

func (b *brokenReplica) Propose(ctx context.Context, q *pb.InternalRaftRequest) (mvcc.Result, error) {
	switch {
	case b.mode == brokenLost && q.Put != nil && b.n.Add(1)%seldom == 0:
		return mvcc.Result{Resp: &pb.PutResponse{Header: &pb.ResponseHeader{Revision: b.Machine().Rev() + 1}}}, nil
	case b.mode == brokenDouble && q.Put != nil && b.n.Add(1)%seldom == 0:
		if res, err := b.Replica.Propose(ctx, q); err != nil {
			return res, err
		}
	case b.mode == brokenEarlyLease && q.LeaseGrant != nil:
		asked := q.LeaseGrant.TTL
		q.LeaseGrant.TTL = 1
		res, err := b.Replica.Propose(ctx, q)
		if resp, ok := res.Resp.(*pb.LeaseGrantResponse); ok && resp != nil {
			resp.TTL = asked
		}
		return res, err
	}
	return b.Replica.Propose(ctx, q)
}

// brokenWatch breaks a watch service, if the mode is about watches.
func brokenWatch(s pb.WatchServer, mode string) pb.WatchServer {
	if !slices.Contains([]string{brokenWatchDrop, brokenWatchTwice}, mode) {
		return s
	}
	return &brokenWatchServer{WatchServer: s, mode: mode}
}

type brokenWatchServer struct {
	pb.WatchServer
	mode string
	n    atomic.Int64
}

func (b *brokenWatchServer) Watch(s pb.Watch_WatchServer) error {
	return b.WatchServer.Watch(brokenStream{s, b})
}

type brokenStream struct {
	pb.Watch_WatchServer
	b *brokenWatchServer
}

func (s brokenStream) Send(r *pb.WatchResponse) error {
	if len(r.Events) == 0 || s.b.n.Add(1)%seldom != 0 {
		return s.Watch_WatchServer.Send(r)
	}
	if s.b.mode == brokenWatchDrop {
		return nil
	}
	if err := s.Watch_WatchServer.Send(r); err != nil {
		return err
	}
	return s.Watch_WatchServer.Send(r)
}

// brokenServers serve in the place of the host's own endpoints, one port a shard,
// while this node holds a replica.
type brokenServers struct {
	h    *host.Host
	o    options
	ip   string
	base int
	stop chan struct{}
	wg   sync.WaitGroup
}

type brokenServer struct {
	replica etcdapi.Replica
	grpc    *grpc.Server
	done    chan struct{} // closed when it serves no more
}

func serveBroken(h *host.Host, o options) (*brokenServers, error) {
	if !slices.Contains(strings.Split(brokenModes(), ", "), o.broken) {
		return nil, fmt.Errorf("-broken %q is none of %s", o.broken, brokenModes())
	}
	ip, base, err := splitPort(o.etcd)
	if err != nil {
		return nil, err
	}
	e := &brokenServers{h: h, o: o, ip: ip, base: base, stop: make(chan struct{})}
	e.wg.Go(e.follow)
	return e, nil
}

// follow opens and closes the ports as replicas come and go.
func (e *brokenServers) follow() {
	changes, cancel := e.h.Subscribe()
	defer cancel()
	running := map[int]*brokenServer{}
	end := func(s *brokenServer) {
		s.grpc.Stop()
		<-s.done
	}
	for {
		for i, s := range e.h.Shards().Shards() {
			r, ok := e.h.Replica(s.Name)
			if now := running[i]; now != nil && (!ok || now.replica != r) {
				end(now)
				delete(running, i)
			}
			if ok && running[i] == nil {
				if s := e.open(r, i); s != nil {
					running[i] = s
				}
			}
		}
		select {
		case <-changes:
		case <-e.stop:
			for _, s := range running {
				end(s)
			}
			return
		}
	}
}

func (e *brokenServers) open(r etcdapi.Replica, index int) *brokenServer {
	l, err := net.Listen("tcp", net.JoinHostPort(e.ip, strconv.Itoa(e.base+index)))
	if err != nil {
		fmt.Println("cannot serve shard", r.Shard().Name, err)
		return nil
	}
	b := &brokenReplica{Replica: r, mode: e.o.broken}
	g := grpc.NewServer(grpc.MaxRecvMsgSize(2<<20), grpc.MaxSendMsgSize(1<<31-1))
	pb.RegisterKVServer(g, etcdapi.NewKV(b))
	progress := e.o.progress
	if progress == 0 {
		progress = etcdapi.DefaultProgress
	}
	pb.RegisterWatchServer(g, brokenWatch(etcdapi.NewWatch(b, progress), e.o.broken))
	pb.RegisterLeaseServer(g, etcdapi.NewLease(b))
	pb.RegisterMaintenanceServer(g, etcdapi.NewMaintenance(b))
	s := &brokenServer{replica: r, grpc: g, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		_ = g.Serve(l) // ends with Stop
	}()
	return s
}

func (e *brokenServers) close() {
	close(e.stop)
	e.wg.Wait()
}
