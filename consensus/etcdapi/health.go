package etcdapi

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// healthServer answers gRPC's health checks: a replica serves while it runs and is
// not cut off from its leader. The server as a whole ("") is the one service.
type healthServer struct {
	healthpb.UnimplementedHealthServer
	r Replica
}

func (s *healthServer) status() *healthpb.HealthCheckResponse {
	now := healthpb.HealthCheckResponse_SERVING
	select {
	case <-s.r.Done():
		now = healthpb.HealthCheckResponse_NOT_SERVING
	default:
		if s.r.SinceContact() > cutOff*s.r.ElectionTimeout() {
			now = healthpb.HealthCheckResponse_NOT_SERVING
		}
	}
	return &healthpb.HealthCheckResponse{Status: now}
}

func (s *healthServer) Check(_ context.Context, q *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	if q.Service != "" {
		return nil, status.Error(codes.NotFound, "unknown service")
	}
	return s.status(), nil
}

// Watch tells every change until the client or the replica ends.
func (s *healthServer) Watch(q *healthpb.HealthCheckRequest, stream healthpb.Health_WatchServer) error {
	t := time.NewTicker(s.r.ElectionTimeout())
	defer t.Stop()
	last := healthpb.HealthCheckResponse_UNKNOWN
	for {
		now := s.status()
		if q.Service != "" {
			now.Status = healthpb.HealthCheckResponse_SERVICE_UNKNOWN
		}
		if now.Status != last {
			if err := stream.Send(now); err != nil {
				return err
			}
			last = now.Status
		}
		select {
		case <-t.C:
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-s.r.Done():
			return rpctypes.ErrGRPCStopped
		}
	}
}
