package api

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	apiregv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	aggregatorclient "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset"
	aggregatorinformers "k8s.io/kube-aggregator/pkg/client/informers/externalversions"
	availabilitymetrics "k8s.io/kube-aggregator/pkg/controllers/status/metrics"
	remoteavailability "k8s.io/kube-aggregator/pkg/controllers/status/remote"
)

// availabilityWorkers is how many APIServices are asked at once; upstream's.
const availabilityWorkers = 5

// watchAvailability keeps the condition Available of APIServices true that are served elsewhere: all servers send requests there only
// while it is. One server asks and writes, where upstream's ask each, and write against one another when they see it differently.
//
// It costs nothing until there is such an APIService.
func (s *Server) watchAvailability(ctx context.Context, decorate func(context.Context) context.Context) error {
	cfg := s.Loopback(s.build.generic.LoopbackClientConfig.UserAgent, decorate)
	registrations, err := aggregatorclient.NewForConfig(cfg)
	if err != nil {
		return fmt.Errorf("availability of APIServices: %w", err)
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return fmt.Errorf("availability of APIServices: %w", err)
	}
	if !s.awaitRemote(ctx) {
		return nil
	}
	af := aggregatorinformers.NewSharedInformerFactory(registrations, 0)
	f := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(reachability))
	c, err := remoteavailability.New(af.Apiregistration().V1().APIServices(), f.Core().V1().Services(), f.Discovery().V1().EndpointSlices(),
		registrations.ApiregistrationV1(), s.build.dialer, s.build.proxy.pair, s.build.services, availabilitymetrics.New())
	if err != nil {
		return fmt.Errorf("availability of APIServices: %w", err)
	}
	af.Start(ctx.Done())
	f.Start(ctx.Done())
	c.Run(availabilityWorkers, ctx.Done())
	f.Shutdown()
	af.Shutdown()
	return nil
}

// awaitRemote waits for an APIService that is served elsewhere; false when ctx ended first.
func (s *Server) awaitRemote(ctx context.Context) bool {
	found := make(chan struct{}, 1)
	look := func(o any) {
		if a, ok := o.(*apiregv1.APIService); ok && a.Spec.Service != nil {
			select {
			case found <- struct{}{}:
			default:
			}
		}
	}
	inf := s.chain.outer.APIRegistrationInformers.Apiregistration().V1().APIServices().Informer()
	reg, err := inf.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: look, UpdateFunc: func(_, o any) { look(o) }})
	if err != nil { // the informer has ended with the server
		<-ctx.Done()
		return false
	}
	defer func() { _ = inf.RemoveEventHandler(reg) }() // fails when the informer has ended
	select {
	case <-found:
		return true
	case <-ctx.Done():
		return false
	}
}

// reachability keeps of Services and EndpointSlices only what tells whether a Service has endpoints.
func reachability(o any) (any, error) {
	meta := func(m metav1.ObjectMeta) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion}
	}
	switch o := o.(type) {
	case *corev1.Service:
		return &corev1.Service{ObjectMeta: meta(o.ObjectMeta), Spec: corev1.ServiceSpec{Type: o.Spec.Type, Ports: o.Spec.Ports, ClusterIP: o.Spec.ClusterIP}}, nil
	case *discoveryv1.EndpointSlice:
		s := &discoveryv1.EndpointSlice{ObjectMeta: meta(o.ObjectMeta), AddressType: o.AddressType, Ports: o.Ports}
		s.Labels = map[string]string{discoveryv1.LabelServiceName: o.Labels[discoveryv1.LabelServiceName]}
		ready := func(e discoveryv1.Endpoint) bool { return e.Conditions.Ready == nil || *e.Conditions.Ready }
		if i := slices.IndexFunc(o.Endpoints, ready); i >= 0 { // one is as good as many
			s.Endpoints = []discoveryv1.Endpoint{{Addresses: []string{""}, Conditions: discoveryv1.EndpointConditions{Ready: ptr(true)}}}
		}
		return s, nil
	}
	return o, nil
}
