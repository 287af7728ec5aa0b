package main

import (
	"fmt"
	"net"
	"strconv"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"skein.io/skein/consensus/etcdapi"
	"skein.io/skein/consensus/host"
)

// endpoints serves etcd's API, one port a shard. A port is open as long as this
// node holds a replica.
type endpoints struct {
	h    *host.Host
	ip   string
	base int
	stop chan struct{}
	wg   sync.WaitGroup
}

type server struct {
	replica etcdapi.Replica
	grpc    *grpc.Server
	done    chan struct{} // closed when it serves no more
}

func serveEtcd(h *host.Host, addr string) (*endpoints, error) {
	ip, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	base, err := strconv.Atoi(port)
	if err != nil {
		return nil, fmt.Errorf("port of %s: %w", addr, err)
	}
	e := &endpoints{h: h, ip: ip, base: base, stop: make(chan struct{})}
	e.wg.Go(e.follow)
	return e, nil
}

// follow opens and closes the ports as replicas come and go.
func (e *endpoints) follow() {
	changes, cancel := e.h.Subscribe()
	defer cancel()
	running := map[int]*server{}
	for {
		for i, s := range e.h.Shards().Shards() {
			r, ok := e.h.Replica(s.Name)
			now := running[i]
			if now != nil && (!ok || now.replica != r) {
				now.grpc.Stop()
				<-now.done
				delete(running, i)
				now = nil
			}
			if ok && now == nil {
				if now = e.open(r, i); now != nil {
					running[i] = now
				}
			}
		}
		select {
		case <-changes:
		case <-e.stop:
			for _, s := range running {
				s.grpc.Stop()
				<-s.done
			}
			return
		}
	}
}

func (e *endpoints) open(r etcdapi.Replica, index int) *server {
	addr := net.JoinHostPort(e.ip, strconv.Itoa(e.base+index))
	l, err := net.Listen("tcp", addr)
	if err != nil {
		fmt.Println("cannot serve shard", r.Shard().Name, err)
		return nil
	}
	s := &server{replica: r, grpc: newServer(r), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		_ = s.grpc.Serve(l) // ends with Stop
	}()
	return s
}

func newServer(r etcdapi.Replica) *grpc.Server {
	g := grpc.NewServer(grpc.MaxRecvMsgSize(2<<20), grpc.MaxSendMsgSize(1<<31-1))
	pb.RegisterKVServer(g, etcdapi.NewKV(r))
	pb.RegisterWatchServer(g, etcdapi.NewWatch(r, etcdapi.DefaultProgress))
	pb.RegisterLeaseServer(g, etcdapi.NewLease(r))
	pb.RegisterMaintenanceServer(g, etcdapi.NewMaintenance(r))
	pb.RegisterClusterServer(g, etcdapi.NewCluster(r))
	return g
}

func (e *endpoints) close() {
	close(e.stop)
	e.wg.Wait()
}
